"""Cut a BERT's vocabulary to the WordPieces that are most frequent in a text.

python recipes/prune_vocabulary.py --model sentence-transformers/all-MiniLM-L6-v2 --vocab_size 8192 \\
    --dataset wikimedia/wikipedia --dataset_config 20231101.en --output_dir runs/small_teacher/start

Special tokens and single characters stay, so every word can still be written. A small student of a model with 30,522
entries is mostly vocabulary; with fewer, more of it is blocks.
"""

import os
from collections import Counter
from dataclasses import dataclass, field

import torch
from transformers import AutoModel, AutoTokenizer, BertTokenizerFast

from hf_curriculum_distill.lines import errors_in_one_line
from hf_curriculum_distill.parsing import parse_arguments
from hf_curriculum_distill.tasks.reading import check_text, read_dataset


@dataclass
class PruningArguments:
    model: str = field(metadata={"help": "A BERT with its tokenizer: a Hub model or a folder."})
    output_dir: str = field(metadata={"help": "Folder for the pruned model and its tokenizer."})
    vocab_size: int = field(default=8192, metadata={"help": "Entries that are left."})
    dataset: str = field(
        default="wikimedia/wikipedia", metadata={"help": "A file, a glob, a folder or a Hub data set."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    text_column: str = field(default="text", metadata={"help": "The column that holds the text."})
    max_documents: int = field(default=20_000, metadata={"help": "Documents in which the WordPieces are counted."})


@errors_in_one_line()
def main():
    [args] = parse_arguments([PruningArguments], description=__doc__.split("\n")[0])
    tokenizer, model = AutoTokenizer.from_pretrained(args.model), AutoModel.from_pretrained(args.model)
    documents = read_dataset(args.dataset, args.dataset_config)["train"]
    check_text(args.dataset, documents, args.text_column)
    documents = documents.select(range(min(args.max_documents, len(documents))))
    counts = Counter()
    for batch in documents.iter(batch_size=1000):
        for ids in tokenizer(batch[args.text_column], add_special_tokens=False, verbose=False)["input_ids"]:
            counts.update(ids)
    kept = choose(tokenizer, counts, args.vocab_size)

    os.makedirs(args.output_dir, exist_ok=True)
    with open(os.path.join(args.output_dir, "vocab.txt"), "w", encoding="utf-8") as file:
        file.writelines(f"{piece}\n" for piece in tokenizer.convert_ids_to_tokens(kept))
    pruned = BertTokenizerFast.from_pretrained(args.output_dir, do_lower_case=tokenizer.init_kwargs["do_lower_case"])
    pruned.save_pretrained(args.output_dir)
    embeddings = model.get_input_embeddings().weight
    with torch.no_grad():
        embeddings[: len(kept)] = embeddings[kept]
    model.resize_token_embeddings(len(kept))
    model.config.pad_token_id = pruned.pad_token_id
    model.save_pretrained(args.output_dir)
    share = sum(counts[piece] for piece in kept) / counts.total()
    print(f"{args.output_dir}: {len(kept):,} of {len(tokenizer):,} entries, which were {share:.1%} of the text")


def choose(tokenizer, counts: Counter, size: int) -> list[int]:
    """The ids that stay, ascending: special tokens, single characters, then the most frequent."""
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    needed = set(tokenizer.all_special_ids)
    needed |= {number for number, piece in enumerate(pieces) if len(piece.removeprefix("##")) == 1}
    if size < len(needed):
        raise SystemExit(f"vocab_size is {size}, but special tokens and single characters alone are {len(needed)}.")
    by_frequency = dict.fromkeys([*(number for number, _ in counts.most_common()), *range(len(pieces))])
    others = [number for number in by_frequency if number not in needed]
    return sorted([*needed, *others[: size - len(needed)]])


if __name__ == "__main__":
    main()
