"""Text for masked language modelling: packed blocks without padding, masked as BERT does (Devlin et al., 2019)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase, default_data_collator

from hf_curriculum_distill.randomness import preserved_random_state


def pack_blocks(
    documents: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    text_column: str = "text",
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """Tokenize documents and cut them, joined, into blocks that need neither padding nor an attention mask.

    One row: `{"input_ids": [CLS] the cat sat [SEP] a new document ... [SEP]}`, `block_size` token ids. Documents are
    joined 1,000 at a time; what does not fill a last block is left out, less than one block in 1,000 documents.

    Raises:
        ValueError: there is no such column, the tokenizer has no [CLS] and [SEP], or the block is too small for them.
    """
    if documents.column_names is not None and text_column not in documents.column_names:
        raise ValueError(f"The data set has no column {text_column!r}, only {documents.column_names}; set text_column.")
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise ValueError(f"{type(tokenizer).__name__} has no [CLS] or [SEP] token; use a masked-LM tokenizer.")
    if block_size < 3:
        raise ValueError(f"block_size is {block_size}; [CLS], one token and [SEP] need at least 3.")
    start, end, width = tokenizer.cls_token_id, tokenizer.sep_token_id, block_size - 2

    def pack(batch: dict[str, list]) -> dict[str, list[list[int]]]:
        stream: list[int] = []
        for ids in tokenizer(batch[text_column], add_special_tokens=False, verbose=False)["input_ids"]:
            stream += [*ids, end]
        blocks = [stream[i : i + width] for i in range(0, len(stream) - width + 1, width)]
        return {"input_ids": [[start, *block, end] for block in blocks]}

    options = {"batched": True, "batch_size": 1000, "remove_columns": documents.column_names}
    if isinstance(documents, IterableDataset):
        return documents.map(pack, **options)
    return documents.map(pack, **options, num_proc=num_proc, desc=f"Packing blocks of {block_size} tokens")


class MaskedBlocksCollator:
    """Packed blocks -> `input_ids` and `labels`, `[batch, block_size]`; examples that have labels stay as they are.

    Of the tokens that are not special, a share `mlm_probability` is to be predicted: 80 % of them become [MASK], 10 %
    a random token, 10 % stay; every other label is -100.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, mlm_probability: float = 0.15):
        self.tokenizer = tokenizer
        self._masking = DataCollatorForLanguageModeling(tokenizer, mlm_probability=mlm_probability)

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        if "labels" in examples[0]:
            return default_data_collator(list(examples))
        blocks = torch.tensor([example["input_ids"] for example in examples])
        special = torch.isin(blocks, torch.tensor(self.tokenizer.all_special_ids))
        input_ids, labels = self._masking.torch_mask_tokens(blocks, special_tokens_mask=special)
        return {"input_ids": input_ids, "labels": labels}


def mask_once(
    blocks: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, mlm_probability: float, seed: int
) -> Dataset:
    """A held-out set masked once and for all, so that every evaluation of every method asks the same questions."""
    with preserved_random_state(seed):
        masked = MaskedBlocksCollator(tokenizer, mlm_probability)(list(blocks))
    return Dataset.from_dict({name: tensor.tolist() for name, tensor in masked.items()})
