"""Train a WordPiece vocabulary like BERT's, of another size or on another text.

python recipes/train_tokenizer.py --dataset wikimedia/wikipedia --dataset_config 20231101.en --vocab_size 8192 \\
    --output_dir tokenizer
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoTokenizer

from hf_curriculum_distill.cli import parse_arguments


@dataclass
class TokenizerArguments:
    output_dir: str = field(metadata={"help": "Folder for the new tokenizer."})
    vocab_size: int = field(default=8192, metadata={"help": "Entries of the new vocabulary."})
    like: str = field(
        default="recipes/data/bert_uncased",
        metadata={"help": "Tokenizer whose normalization, splitting and special tokens are kept."},
    )
    dataset: str = field(default="wikimedia/wikipedia", metadata={"help": "Hub data set or local folder."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    text_column: str = field(default="text", metadata={"help": "The column that holds the text."})


def main():
    [args] = parse_arguments([TokenizerArguments], description=__doc__.split("\n")[0])
    documents = load_dataset(args.dataset, args.dataset_config, split="train")
    tokenizer = AutoTokenizer.from_pretrained(args.like)
    tokenizer = tokenizer.train_new_from_iterator(_texts(documents, args.text_column), args.vocab_size, len(documents))
    tokenizer.save_pretrained(args.output_dir)
    print(f"{args.output_dir}: {len(tokenizer):,} entries, from {len(documents):,} documents")


def _texts(documents, column: str) -> Iterator[list[str]]:
    for batch in documents.iter(batch_size=1000):
        yield batch[column]


if __name__ == "__main__":
    main()
