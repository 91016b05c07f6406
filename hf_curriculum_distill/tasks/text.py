"""Text for language models, in packed blocks or single sentences; masked as BERT does (Devlin et al., 2019)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase, default_data_collator

from hf_curriculum_distill.batches.randomness import preserved_random_state
from hf_curriculum_distill.logs import get_logger

logger = get_logger(__name__)


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

    Args:
        documents: rows with a text.
        tokenizer: of a masked language model.
        block_size: tokens of a block, [CLS] and [SEP] included.
        text_column: the column that holds the text.
        num_proc: processes that tokenize; a stream is tokenized in the process that reads it.

    Raises:
        ValueError: there is no such column, the tokenizer has no [CLS] and [SEP], or the block is too small for them.
    """
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

    return _packed(documents, pack, block_size, text_column, num_proc)


def tokenize_documents(
    documents: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    text_column: str = "text",
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """Tokenize documents one by one, for texts that mean nothing when joined, such as proteins.

    One row: `{"input_ids": [CLS] the cat sat [SEP]}`, cut to `block_size` tokens. Documents without a token that is not
    special, of which nothing can be masked, are left out.

    Arguments and errors as of [`pack_blocks`].
    """

    def tokenize(batch: dict[str, list]) -> dict[str, list[list[int]]]:
        encoded = tokenizer(batch[text_column], truncation=True, max_length=block_size, verbose=False)
        return {"input_ids": [ids for ids in encoded["input_ids"] if not special.issuperset(ids)]}

    special = set(tokenizer.all_special_ids)
    rows = _packed(documents, tokenize, block_size, text_column, num_proc)
    if isinstance(rows, Dataset) and len(rows) < len(documents):
        number = len(documents) - len(rows)
        logger.warning("%d of %d documents have no token to mask and are left out.", number, len(documents))
    return rows


def pack_causal_blocks(
    documents: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    text_column: str = "text",
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """Tokenize documents and cut them, joined, into blocks of a causal language model, without padding.

    One row: `{"input_ids": the cat sat <eos> a new document ..., "labels": the same, "num_bytes": 511}`. `num_bytes` is
    the length in UTF-8 of the text that all tokens but the first stand for, those that a model predicts; <eos> stands
    for none, and a character that is cut into several tokens belongs to the first of them. Documents are joined 1,000
    at a time; what does not fill a last block is left out, less than one block in 1,000 documents.

    Args:
        documents: rows with a text; empty ones are left out.
        tokenizer: of a causal language model.
        block_size: tokens of a block.
        text_column: the column that holds the text.
        num_proc: processes that tokenize; a stream is tokenized in the process that reads it.

    Raises:
        ValueError: there is no such column, the tokenizer has no <eos> or does not say which text a token stands for,
            or the block is too small to predict anything.
    """
    check_causal_tokenizer(tokenizer)
    if block_size < 2:
        raise ValueError(f"block_size is {block_size}; a token and the one that is predicted from it need at least 2.")

    def pack(batch: dict[str, list]) -> dict[str, np.ndarray]:
        texts = [text for text in batch[text_column] if text]
        ids, num_bytes = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        if texts:
            encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids += [np.array([*own, tokenizer.eos_token_id]) for own in encoded["input_ids"]]
            ends = ([end for _, end in offsets] for offsets in encoded["offset_mapping"])
            num_bytes += map(_bytes_of_tokens, texts, ends)
        num_blocks = sum(map(len, ids)) // block_size
        blocks, of_blocks = (
            np.concatenate(each)[: num_blocks * block_size].reshape(num_blocks, block_size) for each in (ids, num_bytes)
        )
        return {"input_ids": blocks, "labels": blocks, "num_bytes": of_blocks[:, 1:].sum(1)}

    tokens = List(Value("int64"))
    features = Features({"input_ids": tokens, "labels": tokens, "num_bytes": Value("int64")})
    return _packed(documents, pack, block_size, text_column, num_proc, features)


def check_causal_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a `ValueError` for a tokenizer that [`pack_causal_blocks`] cannot use."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no end-of-sequence token to put between documents; set its eos_token."
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say which text a token stands for, so bytes can't be counted; use a "
            "tokenizer of the tokenizers library (with a tokenizer.json)."
        )


def _bytes_of_tokens(text: str, ends: Sequence[int]) -> np.ndarray:
    """The UTF-8 bytes of a document that each of its tokens stands for, and those that follow its last token.

    Args:
        ends: the number of characters of the text up to the end of each token.
    """
    characters = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = np.searchsorted([0, 0x80, 0x800, 0x10000], characters, "right")
    bytes_until = np.concatenate([[0], np.cumsum(sizes)])
    return np.diff(bytes_until[np.maximum.accumulate([0, *ends, len(text)])])


def _packed(
    documents: Dataset | IterableDataset,
    pack: Callable[..., Any],
    block_size: int,
    text_column: str,
    num_proc: int | None,
    features: Features | None = None,
) -> Dataset | IterableDataset:
    columns = documents.column_names
    if columns is None:  # a stream of files that do not say what they hold
        columns = list(next(iter(documents), {text_column: None}))
    if text_column not in columns:
        raise ValueError(f"The data set has no column {text_column!r}, only {columns}; set text_column.")
    options = {"batched": True, "batch_size": 1000, "remove_columns": columns, "features": features}
    if isinstance(documents, IterableDataset):
        return documents.map(pack, **options)
    return documents.map(pack, **options, num_proc=num_proc, desc=f"Packing blocks of {block_size} tokens")


class MaskedBlocksCollator:
    """Blocks or sentences -> `input_ids` and `labels`, `[batch, length]`; examples that have labels stay as they are.

    Of the tokens that are not special, a share `mlm_probability` is to be predicted: 80 % of them become [MASK], 10 %
    a random token, 10 % stay; every other label is -100. The random token is any of the vocabulary, special ones too:
    set `random_ids` if the vocabulary is so small that this matters.

    Examples of different lengths are padded to the longest, with label -100 there and an `attention_mask`.

    Args:
        tokenizer: knows the special tokens.
        mlm_probability: share of the tokens that is to be predicted.
        random_ids: ids that the random token is drawn from; None: all of the vocabulary.
        fixed_count: whether an example's number of labels is [`labels_per_example`] instead of random, as in the
            original BERT. Shapes are then the same from batch to batch, and the trainer knows them without waiting for
            the device.
        whole_words: whether words are chosen instead of tokens, all pieces of a word together, as in BERT's later
            releases; with `fixed_count` the last word of an example is masked in part if its pieces are too many.

    Raises:
        ValueError: `random_ids` are not in the vocabulary, lengths differ and the tokenizer has no [PAD] token, an
            example has too few tokens to mask, or `whole_words` is set and the vocabulary marks no piece with ##.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        mlm_probability: float = 0.15,
        random_ids: Sequence[int] | None = None,
        fixed_count: bool = False,
        whole_words: bool = False,
    ):
        if random_ids is not None and not (random_ids and 0 <= min(random_ids) <= max(random_ids) < len(tokenizer)):
            raise ValueError(f"random_ids is {random_ids}; give ids from 0 to {len(tokenizer) - 1}, or None for all.")
        self.tokenizer, self.mlm_probability, self.fixed_count = tokenizer, mlm_probability, fixed_count
        self.random_ids = None if random_ids is None else torch.tensor(random_ids)
        self._masking = DataCollatorForLanguageModeling(
            tokenizer, mlm_probability=mlm_probability, random_replace_prob=0.1 if random_ids is None else 0.0
        )
        self._continues_word = None
        if whole_words:
            pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
            self._continues_word = torch.tensor([piece.startswith("##") for piece in pieces])
            if not self._continues_word.any():
                raise ValueError(
                    "whole_words needs a WordPiece vocabulary, in which the later pieces of a word begin with ##, and "
                    f"that of {type(tokenizer).__name__} has none; leave it out."
                )
        if fixed_count or whole_words:
            self._masking.mlm_probability = 1.0  # of the tokens that are chosen

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        same_length, labelled = bool((lengths == lengths[0]).all()), "labels" in examples[0]
        if same_length and labelled:
            return default_data_collator(list(examples))
        if not same_length and self.tokenizer.pad_token_id is None:
            raise ValueError(
                f"The examples have {lengths.min()} to {lengths.max()} tokens but {type(self.tokenizer).__name__} has "
                "no [PAD] token; set its pad_token or give blocks of one length."
            )
        ids = _padded(examples, "input_ids", self.tokenizer.pad_token_id)
        if labelled:
            batch = {"input_ids": ids, "labels": _padded(examples, "labels", -100)}
        else:
            batch = self._mask(ids, lengths)
        if not same_length:
            batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        return batch

    def labels_per_example(self, length: int) -> int | None:
        """Labels of an example of `length` tokens, special ones included; None: their number is random."""
        return max(1, round(self.mlm_probability * length)) if self.fixed_count else None

    def _mask(self, ids: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        exempt = torch.isin(ids, torch.tensor(self.tokenizer.all_special_ids))
        if self.fixed_count or self._continues_word is not None:
            exempt = ~self._choose(~exempt, lengths, self._draws(ids))
        input_ids, labels = self._masking.torch_mask_tokens(ids, special_tokens_mask=exempt)
        if self.random_ids is not None:
            # A token to predict is still itself in 20 % of the cases: half of them get a random one.
            random = (input_ids == labels) & (torch.rand(labels.shape) < 0.5)
            input_ids[random] = self.random_ids[torch.randint(len(self.random_ids), labels.shape)][random]
        return {"input_ids": input_ids, "labels": labels}

    def _draws(self, ids: Tensor) -> Tensor:
        """Uniform numbers `[batch, length]`; with whole words the pieces of a word share theirs."""
        draws = torch.rand(ids.shape)
        if self._continues_word is None:
            return draws
        word = (~self._continues_word[ids]).long().cumsum(1).clamp(min=1) - 1
        return draws.gather(1, word)

    def _choose(self, maskable: Tensor, lengths: Tensor, draws: Tensor) -> Tensor:
        """Choose maskable tokens, all equally likely, `labels_per_example` of each example or a share of them.

        Returns:
            `[batch, length]`, bool.
        """
        if not self.fixed_count:
            return maskable & (draws < self.mlm_probability)
        counts = torch.tensor([self.labels_per_example(length) for length in lengths.tolist()])
        if (lacking := counts > maskable.sum(1)).any():
            example = int(lacking.nonzero()[0])
            there = int(maskable[example].sum())
            raise ValueError(
                f"Example {example} of a batch has {lengths[example]} tokens, of which {there} are not "
                f"special, but fixed_count masks {counts[example]} of so many; leave such examples out, or set "
                "fixed_count=False."
            )
        first = draws.masked_fill(~maskable, 2.0).sort(stable=True).indices[:, : int(counts.max())]
        return torch.zeros_like(maskable).scatter(1, first, torch.arange(first.shape[1]) < counts[:, None])


def _padded(examples: Sequence[dict[str, Any]], name: str, padding: int | None) -> Tensor:
    # through NumPy: torch takes three times as long to read a list
    rows = [torch.from_numpy(np.array(example[name], np.int64)) for example in examples]
    return pad_sequence(rows, batch_first=True, padding_value=0 if padding is None else padding)


def mask_once(
    blocks: Dataset | Iterable[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    mlm_probability: float,
    seed: int,
    random_ids: Sequence[int] | None = None,
) -> Dataset:
    """Mask blocks once, so that every evaluation, or every epoch and every student, predicts the same tokens.

    Args:
        blocks: rows with `input_ids`. A `Dataset` of files stays on disk, and the masked one is cached beside it.
        tokenizer: knows the special tokens.
        mlm_probability: share of the tokens that is to be predicted.
        seed: of the draws.
        random_ids: see [`MaskedBlocksCollator`].

    Returns:
        Rows with `input_ids` and `labels`, each as long as its block.
    """
    blocks = blocks if isinstance(blocks, Dataset) else Dataset.from_list(list(blocks))
    collate = MaskedBlocksCollator(tokenizer, mlm_probability, random_ids)

    def mask(batch: dict[str, list], indices: list[int]) -> dict[str, list[list[int]]]:
        with preserved_random_state(seed + indices[0]):  # the fingerprint of a cached result holds the seed
            masked = collate([{"input_ids": ids} for ids in batch["input_ids"]])
        lengths = [len(ids) for ids in batch["input_ids"]]
        return {
            name: [row[:length] for row, length in zip(masked[name].tolist(), lengths, strict=True)]
            for name in ("input_ids", "labels")
        }

    return blocks.map(mask, with_indices=True, batched=True, remove_columns=blocks.column_names, desc="Masking blocks")
