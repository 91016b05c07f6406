"""The slow truths beside the fast sampler: a recogniser and exact distributions, both straight from the rules."""

import hashlib
from collections import Counter
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

from hf_curriculum_distill.tasks.pcfg import (
    GRAMMARS,
    LETTER_IDS,
    Grammar,
    pcfg_dataset,
    pcfg_tokenizer,
)
from hf_curriculum_distill.tasks.text import MaskedBlocksCollator, mask_once

SMALL = [("cfg3b", 10), ("cfg3b", 13), ("cfg3b", 14), ("cfg3b", 15), ("cfg3b_original", 13), ("cfg3f", 11)]


def recognises(grammar, sentence):
    @cache
    def ends(symbol, begin):
        """Where a stretch that `symbol` becomes may end, if it begins at `begin`."""
        if symbol not in grammar.rules:
            return {begin + 1} if begin < len(sentence) and sentence[begin] == symbol else set()
        return {end for alternative in grammar.rules[symbol] for end in ends_of_all(alternative, {begin})}

    def ends_of_all(symbols, begins):
        for symbol in symbols:
            begins = {end for begin in begins for end in ends(symbol, begin)}
        return begins

    return len(sentence) in ends(grammar.start, 0)


def probabilities(grammar, symbol=None):
    """Every sentence and its probability."""
    symbol = grammar.start if symbol is None else symbol
    if symbol not in grammar.rules:
        return {(symbol,): 1.0}
    total = Counter()
    for alternative in grammar.rules[symbol]:
        for parts in product(*(probabilities(grammar, child).items() for child in alternative)):
            sentence = tuple(letter for letters, _ in parts for letter in letters)
            total[sentence] += np.prod([share for _, share in parts]) / len(grammar.rules[symbol])
    return dict(total)


def two_levels(grammar, symbol):
    """What `symbol` becomes after two replacements, the symbols there written as letters."""
    children = {child for alternative in grammar.rules[symbol] for child in alternative}
    below = {each for child in children for alternative in grammar.rules[child] for each in alternative}
    letter = {each: (each - 1) % 3 + 1 for each in below}
    rules = {child: tuple(tuple(map(letter.get, each)) for each in grammar.rules[child]) for child in children}
    return Grammar(symbol, {symbol: grammar.rules[symbol], **rules})


@pytest.mark.parametrize(("name", "start"), SMALL)
def test_sentences_of_a_small_grammar_have_the_probabilities_of_its_rules(name, start):
    assert_probabilities(GRAMMARS[name].started_at(start), 50_000)


@pytest.mark.parametrize("name", GRAMMARS)
def test_alternatives_of_every_symbol_are_equally_likely(name):
    for symbol in range(10, 23):
        assert_probabilities(two_levels(GRAMMARS[name], symbol), 10_000)


def assert_probabilities(grammar, num_sentences):
    expected = probabilities(grammar)
    counts = Counter(map(tuple, grammar.sample(num_sentences, seed=3)))
    assert counts.keys() <= expected.keys()
    assert sum(expected.values()) == pytest.approx(1)
    chi_square = sum((counts[each] - num_sentences * p) ** 2 / (num_sentences * p) for each, p in expected.items())
    freedom = len(expected) - 1
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("name", GRAMMARS)
def test_sampled_sentences_are_recognised_and_those_with_a_wrong_letter_mostly_not(name):
    rng = np.random.default_rng(0)
    recognised = []
    for sentence in map(np.ndarray.tolist, GRAMMARS[name].sample(20, seed=1)):
        assert recognises(GRAMMARS[name], sentence)
        place = rng.integers(len(sentence))
        sentence[place] = sentence[place] % 3 + 1
        recognised.append(recognises(GRAMMARS[name], sentence))
    assert np.mean(recognised) < 0.3


def test_letters_lie_at_depth_six_and_lengths_are_exact():
    assert {grammar.depth for grammar in GRAMMARS.values()} == {6}
    assert GRAMMARS["cfg3b"].mean_length() == 294
    assert GRAMMARS["cfg3b_original"].mean_length() == 294 * (3 + 2 * 2.5 - 0.5) / 8  # 9 is 2.5 letters, not 3
    for name, start in SMALL:
        grammar = GRAMMARS[name].started_at(start)
        lengths = sum(len(sentence) * p for sentence, p in probabilities(grammar).items())
        assert grammar.mean_length() == pytest.approx(lengths)


@pytest.mark.parametrize("name", GRAMMARS)
def test_mean_length_of_a_sample_is_the_expected_one(name):
    lengths = [len(sentence) for sentence in GRAMMARS[name].sample(5000, seed=2)]
    assert abs(np.mean(lengths) - GRAMMARS[name].mean_length()) < 4 * np.std(lengths) / len(lengths) ** 0.5


@pytest.mark.parametrize(
    ("name", "digest"),
    [("cfg3b", "df9019560041bdb7"), ("cfg3b_original", "e7417ad709e9ff3a"), ("cfg3f", "6a85b6f5348e4d7b")],
)
def test_a_seed_fixes_the_sentences_for_ever(name, digest):
    sentences = GRAMMARS[name].sample(2000, seed=0)
    assert hashlib.sha256(b"".join(map(bytes, sentences))).hexdigest()[:16] == digest
    for num_sentences in (1, 499, 500, 501):
        fewer = GRAMMARS[name].sample(num_sentences, seed=0)
        assert len(fewer) == num_sentences
        assert all(map(np.array_equal, fewer, sentences))
    assert not np.array_equal(sentences[0], GRAMMARS[name].sample(1, seed=1)[0])
    assert len({bytes(sentence) for sentence in sentences}) == 2000


def test_grammars_and_samples_that_cannot_be_are_errors():
    with pytest.raises(ValueError, match=r"no rules for the start symbol 30; use one of \[22, 21"):
        GRAMMARS["cfg3b"].started_at(30)
    with pytest.raises(ValueError, match=r"Symbols \[4\]: only 1, 2 and 3 have no rules"):
        Grammar.from_text("5->4 1")
    with pytest.raises(ValueError, match=r"Symbols \[3, 256\]"):
        Grammar.from_text("256->3; 3->1")
    with pytest.raises(ValueError, match="From 5, letters lie at different depths"):
        Grammar.from_text("5->4 1; 4->1 2")
    with pytest.raises(ValueError, match="From 5, letters lie at different depths or nowhere"):
        Grammar.from_text("5->4; 4->5")
    with pytest.raises(ValueError, match="empty alternative"):
        Grammar.from_text("5->1 2|")
    with pytest.raises(ValueError, match="Cannot read the rule '4 1 2'"):
        Grammar.from_text("5->4; 4 1 2")
    with pytest.raises(ValueError, match="num_sentences is 0"):
        GRAMMARS["cfg3b"].sample(0, seed=0)
    with pytest.raises(ValueError, match="max_length is 0"):
        pcfg_dataset(GRAMMARS["cfg3b"], 10, seed=0, max_length=0)


def test_the_tokenizer_is_the_same_after_saving_and_serves_hugging_faces_collator(tmp_path):
    tokenizer = pcfg_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert len(each) == each.vocab_size == 8
        assert each.convert_tokens_to_ids([*"abc"]) == list(LETTER_IDS)
        special = [each.pad_token_id, each.cls_token_id, each.sep_token_id, each.mask_token_id, each.unk_token_id]
        assert special == [0, 1, 2, 3, 4]
        assert dict(each("cab[MASK]x")) == {"input_ids": [7, 5, 6, 3, 4], "attention_mask": [1] * 5}
        assert each.decode([7, 5, 6, 3]) == "cab[MASK]"
    rows = list(pcfg_dataset(GRAMMARS["cfg3b"].started_at(13), 8, seed=0, max_length=16))
    batch = DataCollatorForLanguageModeling(tokenizer)(rows)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape


def test_rows_are_the_sentences_cut_after_max_length():
    grammar, tokenizer = GRAMMARS["cfg3b"].started_at(14), pcfg_tokenizer()
    rows = pcfg_dataset(grammar, 1200, seed=0, max_length=24)
    sentences = ["".join("abc"[letter - 1] for letter in sentence[:24]) for sentence in grammar.sample(1200, seed=0)]
    assert rows.column_names == ["input_ids"]
    assert [tokenizer.decode(ids) for ids in rows["input_ids"]] == sentences
    assert rows[600:602]["input_ids"] == [rows[600]["input_ids"], rows[601]["input_ids"]]
    assert {len(ids) for ids in rows["input_ids"]} == {21, 22, 23, 24}


def test_the_row_drawn_in_the_docstring_is_real():
    rows = pcfg_dataset(GRAMMARS["cfg3b"].started_at(13), 3, seed=0, max_length=512)
    assert rows[1]["input_ids"] == [5, 6, 7, 7, 6, 7, 6, 5, 7, 6, 7, 6, 5, 5, 6, 7]


def test_masking_leaves_padding_alone_and_draws_random_letters_only():
    tokenizer = pcfg_tokenizer()
    rows = list(pcfg_dataset(GRAMMARS["cfg3f"], 1000, seed=0, max_length=512))
    torch.manual_seed(0)
    batch = MaskedBlocksCollator(tokenizer, 0.3, LETTER_IDS)(rows)
    given, labels = batch["input_ids"], batch["labels"]
    letters = batch["attention_mask"].bool()
    assert letters.sum(1).tolist() == [len(row["input_ids"]) for row in rows]
    assert given.shape == labels.shape == letters.shape
    assert (given[~letters] == tokenizer.pad_token_id).all()
    assert (labels[~letters] == -100).all()

    original = torch.cat([torch.tensor(row["input_ids"]) for row in rows])
    given, labels = given[letters], labels[letters]
    counted = labels != -100
    assert torch.equal(labels[counted], original[counted])
    assert torch.equal(given[~counted], original[~counted])
    assert set(given[counted].tolist()) == {tokenizer.mask_token_id, *LETTER_IDS}
    masked = given[counted] == tokenizer.mask_token_id
    other = ~masked & (given[counted] != original[counted])
    # A random letter is the letter itself in one case of three.
    for found, share in ((counted, 0.3), (masked, 0.8), (other, 0.1 * 2 / 3)):
        assert abs(found.float().mean() - share) < 4 * (share * (1 - share) / len(found)) ** 0.5


def test_a_held_out_set_keeps_its_masks_whatever_it_is_batched_with():
    tokenizer = pcfg_tokenizer()
    rows = pcfg_dataset(GRAMMARS["cfg3b"], 64, seed=1, max_length=512)
    held_out = mask_once(rows, tokenizer, 0.3, seed=0, random_ids=LETTER_IDS)
    assert held_out[:] == mask_once(rows, tokenizer, 0.3, seed=0, random_ids=LETTER_IDS)[:]
    assert (
        list(map(len, held_out["labels"])) == list(map(len, held_out["input_ids"])) == list(map(len, rows["input_ids"]))
    )
    collator = MaskedBlocksCollator(tokenizer, 0.3, LETTER_IDS)
    for begin in (0, 7):
        batch = collator([held_out[i] for i in range(begin, begin + 9)])
        for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            assert batch["input_ids"][i, :length].tolist() == held_out[begin + i]["input_ids"]
            assert batch["labels"][i, :length].tolist() == held_out[begin + i]["labels"]
            assert (batch["input_ids"][i, length:] == tokenizer.pad_token_id).all()
            assert (batch["labels"][i, length:] == -100).all()
