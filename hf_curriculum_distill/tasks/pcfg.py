"""Sentences of the context-free grammars whose masked language models are distilled, drawn fast and from a seed.

The grammars are those of Allen-Zhu & Li (2023, arXiv 2305.13673); Panigrahi et al. (2025, arXiv 2410.05464) distil
masked language models of `cfg3b`. To predict a masked letter well, a model has to parse the sentence around it. A
random letter in place of a masked one is drawn from `LETTER_IDS`, because 5 of the 8 tokens are no letters.

```python
tokenizer, grammar = pcfg_tokenizer(), GRAMMARS["cfg3b"]
train = pcfg_dataset(grammar, num_sentences=100_000, seed=0, max_length=512)
held_out = mask_once(pcfg_dataset(grammar, 4096, seed=1, max_length=512), tokenizer, 0.3, seed=0, random_ids=LETTER_IDS)
collator = MaskedBlocksCollator(tokenizer, mlm_probability=0.3, random_ids=LETTER_IDS)
```
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import chain

import numpy as np
import pyarrow
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = {"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]", "unk": "[UNK]"}
LETTERS = "abc"
LETTER_IDS = tuple(range(len(SPECIAL_TOKENS), len(SPECIAL_TOKENS) + len(LETTERS)))
TERMINALS = frozenset({1, 2, 3})  # written a, b, c

# Sentences are drawn in blocks small enough for the processor's cache; another number draws other sentences.
_BLOCK = 500


@dataclass(frozen=True)
class Grammar:
    """A context-free grammar whose alternatives are equally likely and whose letters all lie at the same depth.

    `rules` has a symbol's alternatives, each the symbols it becomes; 1, 2 and 3, the letters a, b and c, have none.

    Raises:
        ValueError: symbols without rules that are no letters, an empty alternative, or letters at different depths.
    """

    start: int
    rules: Mapping[int, tuple[tuple[int, ...], ...]]

    def __post_init__(self):
        if self.start not in self.rules:
            raise ValueError(f"The grammar has no rules for the start symbol {self.start}; use one of {[*self.rules]}.")
        used = {self.start, *chain(*chain(*self.rules.values()))}
        if wrong := sorted((used - TERMINALS - self.rules.keys()) | (self.rules.keys() - {*range(4, 256)})):
            raise ValueError(f"Symbols {wrong}: only 1, 2 and 3 have no rules; give all others rules, and 4 to 255.")
        if not all(chain(self.rules.values(), *self.rules.values())):
            raise ValueError("The grammar has an empty alternative; give every alternative at least one symbol.")
        _ = self.depth  # raises

    @classmethod
    def from_text(cls, text: str) -> Grammar:
        """Read rules such as `"5->4 4|4; 4->1 2|3"`; the first symbol is the start."""
        rules = {}
        for rule in text.split(";"):
            symbol, arrow, alternatives = rule.partition("->")
            if not (arrow and symbol.strip().isdecimal()):
                raise ValueError(f"Cannot read the rule {rule.strip()!r}; write it as '5->4 4|4', rules joined by ';'.")
            rules[int(symbol)] = tuple(tuple(map(int, symbols.split())) for symbols in alternatives.split("|"))
        return cls(next(iter(rules)), rules)

    def started_at(self, symbol: int) -> Grammar:
        """The smaller grammar of what `symbol` becomes.

        cfg3b has sentences of 161 to 432 letters, from 17 on 56 to 72, from 14 on 21 to 27. Of the last there are only
        1,024: any training set of some size holds all of them, and the held-out sentences too.
        """
        return replace(self, start=symbol)

    @cached_property
    def depth(self) -> int:
        """How many times every symbol of a sentence is replaced until all are letters."""
        symbols = {self.start}
        for depth in range(len(self.rules) + 1):
            if symbols <= TERMINALS:
                return depth
            if symbols & TERMINALS:
                break
            symbols = {child for symbol in symbols for alternative in self.rules[symbol] for child in alternative}
        raise ValueError(f"From {self.start}, letters lie at different depths or nowhere; give them all one depth.")

    def mean_length(self) -> float:
        """The expected number of letters of a sentence, exactly."""

        @cache
        def mean(symbol: int) -> float:
            alternatives = self.rules.get(symbol)
            return sum(sum(map(mean, each)) for each in alternatives) / len(alternatives) if alternatives else 1.0

        return mean(self.start)

    def sample(self, num_sentences: int, seed: int) -> list[np.ndarray]:
        """Draw sentences of letters 1, 2, 3 as uint8 arrays; more from one seed begin with the same ones.

        >>> GRAMMARS["cfg3b"].started_at(10).sample(2, seed=0)
        [array([3, 2, 1, 3, 1, 2, 1, 2, 3], dtype=uint8), array([3, 1, 3, 2, 1, 3, 2], dtype=uint8)]

        Raises:
            ValueError: `num_sentences` is below 1.
        """
        return [*chain.from_iterable(self._blocks(num_sentences, seed))]

    def _blocks(self, num_sentences: int, seed: int) -> Iterator[list[np.ndarray]]:
        if num_sentences < 1:
            raise ValueError(f"num_sentences is {num_sentences}; draw at least 1.")
        first_rule, num_alternatives, lengths, symbols_of_rule = self._tables
        # The raw stream of PCG64, unlike what Generator makes of it, is fixed for all versions of NumPy.
        stream = np.random.PCG64(seed)
        for begin in range(0, num_sentences, _BLOCK):
            symbols, ends = np.full(_BLOCK, self.start, np.uint8), np.arange(1, _BLOCK + 1)
            for _ in range(self.depth):
                uniform = stream.random_raw(len(symbols)) >> 32
                rule = first_rule[symbols] + (uniform * num_alternatives[symbols] >> 32)
                ends = np.cumsum(lengths[rule])[ends - 1]
                symbols = symbols_of_rule[rule].ravel()
                symbols = symbols[symbols > 0]
            yield np.split(symbols, ends[:-1])[: num_sentences - begin]

    @cached_property
    def _tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """By symbol: its first rule's row, its number of rules; by row: the rule's length, its symbols and zeros."""
        rows = [*chain.from_iterable(self.rules.values())]
        first_rule, num_alternatives = np.zeros((2, 256), np.uint64)
        next_row = 0
        for symbol, alternatives in self.rules.items():
            first_rule[symbol], num_alternatives[symbol] = next_row, len(alternatives)
            next_row += len(alternatives)
        lengths = np.array([len(row) for row in rows])
        symbols = np.zeros((len(rows), lengths.max()), np.uint8)
        for padded, row in zip(symbols, rows, strict=True):
            padded[: len(row)] = row
        return first_rule, num_alternatives, lengths, symbols


CFG3B = """22->21 20|20 19; 21->18 16|16 18 17; 20->17 16 18|16 17; 19->16 17 18|17 18 16;
    18->15 14 13|14 13; 17->14 13 15|15 13 14; 16->15 13|13 15 14; 15->12 11 10|11 12 10; 14->11 10 12|10 11 12;
    13->11 12|12 11; 12->8 9 7|9 7 8; 11->8 7 9|7 8 9; 10->7 9 8|9 8 7; 9->3 2 1; 8->3 2|3 1 2; 7->3 1|1 2 3"""
CFG3F = """22->20 21|20 19 21|21 19 19|20 20; 21->18 17|17 16|16 17 18|16 18; 20->16 16|16 17|17 16 18;
    19->18 16 18|17 18|18 18; 18->14 15 13|15 13 13|13 15; 17->15 14 13|14 15|15 14; 16->15 15|13 15 13|14 13|14 14;
    15->10 11 11|11 11 10|10 10|12 12 11; 14->10 12|12 10 12|12 11|10 12 12; 13->11 12|12 11 12|10 12 11;
    12->7 9 7|9 8|8 8 9; 11->8 8|9 7|9 7 7; 10->8 9 9|9 7 9|7 9 9; 9->1 2 1|3 3|1 1; 8->3 1 1|1 2|3 3 1;
    7->2 2 1|3 2 2|3 1 2|3 2"""

# cfg3b is the grammar of the published distillation tables: the original less one of its rules, 9->2 1.
GRAMMARS: dict[str, Grammar] = {
    "cfg3b": Grammar.from_text(CFG3B),
    "cfg3b_original": Grammar.from_text(CFG3B.replace("9->3 2 1;", "9->3 2 1|2 1;")),
    "cfg3f": Grammar.from_text(CFG3F),
}


def pcfg_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 8 tokens, one per letter: ids 0 to 4 are [PAD] [CLS] [SEP] [MASK] [UNK], 5 to 7 are a, b, c.

    >>> pcfg_tokenizer()("ab[MASK]c")["input_ids"]
    [5, 6, 3, 7]
    """
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS.values(), *LETTERS])}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS["unk"]))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.decoder = decoders.Fuse()
    special = {f"{role}_token": token for role, token in SPECIAL_TOKENS.items()}
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=letters, model_input_names=names, **special)


def pcfg_dataset(grammar: Grammar, num_sentences: int, seed: int, max_length: int) -> Dataset:
    """One sentence per row, in memory at a byte per letter, without [CLS] or [SEP] and cut after `max_length` letters.

    A sentence of cfg3b from 13 on, its row, and what `mask_once` makes of it (3 is [MASK], a dot is -100):

    ```
    sentence   a b c c b c b a c b c b a a b c
    input_ids  5 6 7 7 6 7 6 5 7 6 7 6 5 5 6 7
    input_ids  5 6 3 7 6 7 6 5 7 6 3 3 5 5 6 3
    labels     . 6 7 . . . . . . . 7 6 . . . 7
    ```

    Raises:
        ValueError: `num_sentences` or `max_length` is below 1.
    """
    if max_length < 1:
        raise ValueError(f"max_length is {max_length}; keep at least 1 letter of a sentence.")
    columns = []
    for block in grammar._blocks(num_sentences, seed):
        sentences = [sentence[:max_length] for sentence in block]
        offsets = np.cumsum([0, *map(len, sentences)], dtype=np.int32)
        ids = np.concatenate(sentences) + np.uint8(LETTER_IDS[0] - 1)
        columns.append(pyarrow.ListArray.from_arrays(offsets, ids))
    return Dataset.from_dict({"input_ids": pyarrow.chunked_array(columns)})
