import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer, DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from hf_curriculum_distill.tasks.pcfg import pcfg_tokenizer
from hf_curriculum_distill.tasks.text import (
    MaskedBlocksCollator,
    mask_once,
    pack_blocks,
    pack_causal_blocks,
    tokenize_documents,
)

VOCABULARY = Path(__file__).parents[2] / "recipes/data/bert_uncased"
DOCUMENTS = ["the cat sat on the mat", "a dog", "no one knows what it is like to be a bat"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(VOCABULARY)


def stream(tokenizer):
    """All documents' tokens, each followed by [SEP]."""
    ids = []
    for document in DOCUMENTS:
        ids += [*tokenizer(document, add_special_tokens=False)["input_ids"], tokenizer.sep_token_id]
    return ids


@pytest.mark.parametrize("streaming", [False, True])
def test_blocks_hold_the_documents_in_order_without_padding(tokenizer, streaming):
    documents = Dataset.from_dict({"text": DOCUMENTS, "url": DOCUMENTS})
    documents = documents.to_iterable_dataset() if streaming else documents
    blocks = [row["input_ids"] for row in pack_blocks(documents, tokenizer, block_size=6)]
    assert all(row[0] == tokenizer.cls_token_id and row[-1] == tokenizer.sep_token_id for row in blocks)
    assert {len(row) for row in blocks} == {6}
    joined, whole = [token for row in blocks for token in row[1:-1]], stream(tokenizer)
    assert joined == whole[: len(joined)]
    assert len(whole) - len(joined) < 4


def test_a_wrong_column_a_tokenizer_without_ends_and_a_tiny_block_are_errors(tokenizer):
    documents = Dataset.from_dict({"body": DOCUMENTS})
    with pytest.raises(ValueError, match=r"no column 'text', only \['body'\]"):
        pack_blocks(documents, tokenizer, 6)
    with pytest.raises(ValueError, match="block_size is 2"):
        pack_blocks(documents, tokenizer, 2, text_column="body")
    headless = AutoTokenizer.from_pretrained(VOCABULARY)
    headless.cls_token = None
    with pytest.raises(ValueError, match=r"no \[CLS\]"):
        pack_blocks(documents, headless, 6, text_column="body")


def test_masking_keeps_special_tokens_and_labels_exactly_what_is_to_be_predicted(tokenizer):
    torch.manual_seed(0)
    ids = torch.randint(1000, 30000, (64, 128))
    ids[:, 0], ids[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    batch = MaskedBlocksCollator(tokenizer, 0.15)([{"input_ids": row} for row in ids.tolist()])
    counted = batch["labels"] != -100
    assert set(batch) == {"input_ids", "labels"}  # packed blocks need no attention mask
    assert not counted[:, [0, -1]].any()
    assert torch.equal(batch["labels"][counted], ids[counted])
    assert torch.equal(batch["input_ids"][~counted], ids[~counted])
    masked = batch["input_ids"][counted] == tokenizer.mask_token_id
    kept = batch["input_ids"][counted] == ids[counted]
    assert abs(counted.float().mean() - 0.15) < 0.02
    assert abs(masked.float().mean() - 0.8) < 0.05
    assert abs(kept.float().mean() - 0.1) < 0.04


def test_a_held_out_set_is_masked_once_and_the_same_for_every_run(tokenizer):
    blocks = [{"input_ids": [101, *range(2000, 2030), 102]} for _ in range(8)]
    torch.manual_seed(1)
    first = mask_once(blocks, tokenizer, 0.15, seed=0)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = mask_once(blocks, tokenizer, 0.15, seed=0)
    assert first[:] == second[:] != mask_once(blocks, tokenizer, 0.15, seed=1)[:]
    assert torch.equal(state, torch.get_rng_state())
    collated = MaskedBlocksCollator(tokenizer, 0.15)(list(first))
    assert collated["labels"].tolist() == first["labels"]
    assert collated["input_ids"].tolist() == first["input_ids"]


def test_blocks_of_one_length_are_masked_with_hugging_faces_draws(tokenizer):
    ids = torch.randint(1000, 30000, (8, 16), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(3)
    batch = MaskedBlocksCollator(tokenizer, 0.15)([{"input_ids": row} for row in ids.tolist()])
    torch.manual_seed(3)
    masking = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    input_ids, labels = masking.torch_mask_tokens(ids, special_tokens_mask=torch.zeros(ids.shape))
    assert torch.equal(batch["input_ids"], input_ids)
    assert torch.equal(batch["labels"], labels)


def test_examples_of_different_lengths_are_padded_and_need_a_padding_token(tokenizer):
    examples = [{"input_ids": [101, *range(2000, 2000 + length), 102]} for length in (3, 5)]
    batch = MaskedBlocksCollator(tokenizer, 1.0)(examples)
    assert batch["attention_mask"].tolist() == [[1] * 5 + [0, 0], [1] * 7]
    assert batch["labels"][0].tolist() == [-100, 2000, 2001, 2002, -100, -100, -100]
    assert batch["input_ids"][0, 5:].tolist() == [tokenizer.pad_token_id] * 2
    unpadded = AutoTokenizer.from_pretrained(VOCABULARY)
    unpadded.pad_token = None
    with pytest.raises(ValueError, match=r"5 to 7 tokens but .* has no \[PAD\]"):
        MaskedBlocksCollator(unpadded)(examples)
    for wrong in ([], [-1], [len(tokenizer)]):
        with pytest.raises(ValueError, match="random_ids is"):
            MaskedBlocksCollator(tokenizer, random_ids=wrong)


def test_documents_that_are_not_joined_are_cut_to_the_block(tokenizer):
    rows = tokenize_documents(Dataset.from_dict({"text": DOCUMENTS}), tokenizer, 6)
    assert [tokenizer.decode(row["input_ids"]) for row in rows] == [
        "[CLS] the cat sat on [SEP]",
        "[CLS] a dog [SEP]",
        "[CLS] no one knows what [SEP]",
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_of_which_nothing_can_be_masked_are_left_out(tokenizer, caplog, streaming):
    documents = Dataset.from_dict({"text": ["", DOCUMENTS[0], " ", "[UNK]", DOCUMENTS[1]]})
    rows = tokenize_documents(documents.to_iterable_dataset() if streaming else documents, tokenizer, 6)
    batch = MaskedBlocksCollator(tokenizer, fixed_count=True)(list(rows))
    assert len(batch["labels"]) == 2
    assert ("3 of 5 documents have no token to mask and are left out" in caplog.text) != streaming


# ---- as many labels in every example ----


@given(
    lengths=st.lists(st.integers(4, 40), min_size=1, max_size=5),
    probability=st.floats(0.01, 0.5),
    same=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_fixed_count_is_a_share_of_the_length_in_every_example(tokenizer, lengths, probability, same, seed):
    lengths = lengths[:1] * len(lengths) if same else lengths
    collator = MaskedBlocksCollator(tokenizer, probability, fixed_count=True)
    rows = [[101, *range(2000, 2000 + length - 2), 102] for length in lengths]
    torch.manual_seed(seed)
    batch = collator([{"input_ids": row} for row in rows])
    for row, input_ids, labels in zip(rows, batch["input_ids"], batch["labels"], strict=True):
        counted = [i for i, label in enumerate(labels.tolist()) if label != -100]
        assert len(counted) == collator.labels_per_example(len(row)) == max(1, round(probability * len(row)))
        assert not {0, len(row) - 1}.intersection(counted)
        assert [labels[i] for i in counted] == [row[i] for i in counted]
        assert all(input_ids[i] == row[i] for i in range(len(row)) if i not in counted)
    assert MaskedBlocksCollator(tokenizer, probability).labels_per_example(40) is None


def test_a_fixed_count_chooses_any_tokens_equally_often(tokenizer):
    block = [101, 2000, 2001, 102, 2002, 2003, 2004, 102]  # a document ends within
    collator = MaskedBlocksCollator(tokenizer, 0.25, fixed_count=True)
    torch.manual_seed(0)
    labels = collator([{"input_ids": block}] * 20_000)["labels"]
    chosen = Counter(tuple(row.ne(-100).nonzero().flatten().tolist()) for row in labels)
    assert set(chosen) == set(itertools.combinations((1, 2, 4, 5, 6), 2))
    assert all(abs(count / 20_000 - 0.1) < 0.01 for count in chosen.values())  # 4.7 standard deviations


@pytest.mark.parametrize("random_ids", [None, [7000, 7001]])
def test_a_fixed_count_hides_four_in_five_and_replaces_half_of_the_rest(tokenizer, random_ids):
    torch.manual_seed(0)
    ids = torch.randint(1000, 7000, (128, 128))
    collator = MaskedBlocksCollator(tokenizer, 0.25, random_ids, fixed_count=True)
    batch = collator([{"input_ids": row} for row in ids.tolist()])
    counted = batch["labels"] != -100
    labels, inputs = batch["labels"][counted], batch["input_ids"][counted]
    masked, kept = inputs == tokenizer.mask_token_id, inputs == labels
    assert abs(masked.float().mean() - 0.8) < 0.03  # 4.8 standard deviations
    assert abs(kept.float().mean() - 0.1) < 0.03
    drawn = set(inputs[~masked & ~kept].tolist())
    assert drawn == set(random_ids) if random_ids else len(drawn) > 200


def test_an_example_with_too_few_tokens_to_mask_is_an_error_that_counts_them(tokenizer):
    collator = MaskedBlocksCollator(tokenizer, 0.5, fixed_count=True)
    rows = [[101, 2000, 2001, 2002, 2003, 102], [101, 2000, 102, 2001, 102, 102]]
    with pytest.raises(ValueError, match=r"Example 1 of a batch has 6 tokens, of which 2 are not special.* masks 3 of"):
        collator([{"input_ids": row} for row in rows])
    assert (collator([{"input_ids": rows[0]}])["labels"] != -100).sum() == 3
    for wrong in (-0.1, 1.5):
        with pytest.raises(ValueError, match="mlm_probability"):
            MaskedBlocksCollator(tokenizer, wrong, fixed_count=True)


@given(seed=st.integers(0, 1000), fixed_count=st.booleans())
def test_whole_words_are_masked_with_all_their_pieces(tokenizer, seed, fixed_count):
    torch.manual_seed(seed)
    words = [[2000], [3000, 2015], [4000, 2075, 2015], [5000]]  # 2015 and 2075 are ##s and ##ing
    order = torch.randint(len(words), (40,)).tolist()
    ids = [101, *(piece for word in order for piece in words[word]), 102]
    collator = MaskedBlocksCollator(tokenizer, 0.3, fixed_count=fixed_count, whole_words=True)
    counted = (collator([{"input_ids": ids}])["labels"][0] != -100).tolist()
    assert not counted[0] and not counted[-1]
    split, start = 0, 1
    for word in order:
        chosen = counted[start : start + len(words[word])]
        start += len(words[word])
        split += any(chosen) and not all(chosen)
    assert split <= fixed_count  # the last word may have more pieces than are left to mask
    if fixed_count:
        assert sum(counted) == round(0.3 * len(ids))


def test_whole_words_are_as_many_tokens_as_single_ones(tokenizer):
    torch.manual_seed(0)
    ids = torch.where(torch.rand(64, 128) < 0.3, 2015, 3000)
    counted = MaskedBlocksCollator(tokenizer, 0.15, whole_words=True)([{"input_ids": row} for row in ids.tolist()])
    assert abs((counted["labels"] != -100).float().mean() - 0.15) < 0.02


def test_whole_words_need_a_vocabulary_of_word_pieces():
    with pytest.raises(ValueError, match="whole_words needs a WordPiece vocabulary"):
        MaskedBlocksCollator(pcfg_tokenizer(), whole_words=True)


@given(num_blocks=st.integers(1, 5))
def test_more_blocks_than_a_batch_are_masked_once_too(tokenizer, num_blocks):
    rows = Dataset.from_dict({"input_ids": [[101, *range(2000, 2020), 102]] * (num_blocks * 500)})
    masked = mask_once(rows, tokenizer, 0.15, seed=3)
    assert len(masked) == len(rows) and masked.column_names == ["input_ids", "labels"]
    assert len({str(labels) for labels in masked["labels"]}) > 0.6 * len(rows)  # no batch repeats another's draws


def test_a_fixed_count_leaves_labels_that_are_there(tokenizer):
    blocks = [{"input_ids": [101, *range(2000, 2030), 102]} for _ in range(8)]
    masked = mask_once(blocks, tokenizer, 0.15, seed=0)
    batch = MaskedBlocksCollator(tokenizer, 0.15, fixed_count=True)(list(masked))
    assert batch["labels"].tolist() == masked["labels"]


# ---- blocks for causal models ----


@pytest.fixture(scope="module")
def bytes_tokenizer():
    """Each byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate([*alphabet, "<eos>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@given(documents=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8)), block_size=st.integers(2, 9))
def test_bytes_of_a_block_are_those_of_the_characters_that_begin_in_its_predicted_tokens(
    bytes_tokenizer, documents, block_size
):
    sizes, ids = [], []  # of each token: the bytes of the character if it is its first token
    for document in filter(None, documents):
        for character in document:
            size = len(character.encode())
            sizes += [size, *[0] * (size - 1)]
        ids += [*bytes_tokenizer(document)["input_ids"], bytes_tokenizer.eos_token_id]
        sizes.append(0)
    assert len(ids) == len(sizes)
    starts = range(0, len(ids) - block_size + 1, block_size)
    blocks = pack_causal_blocks(Dataset.from_dict({"text": ["", *documents]}), bytes_tokenizer, block_size)
    assert blocks["input_ids"][:] == blocks["labels"][:] == [ids[i : i + block_size] for i in starts]
    assert blocks["num_bytes"][:] == [sum(sizes[i + 1 : i + block_size]) for i in starts]


@pytest.mark.parametrize("streaming", [False, True])
def test_text_that_a_tokenizer_drops_belongs_to_what_follows_it(tokenizer, streaming):
    causal = AutoTokenizer.from_pretrained(VOCABULARY, eos_token="[SEP]")
    documents = Dataset.from_dict({"text": ["The  cat\n", "É"]})  # the, cat, <eos>, e, <eos>
    documents = documents.to_iterable_dataset() if streaming else documents
    [block] = pack_causal_blocks(documents, causal, block_size=5)
    assert causal.convert_ids_to_tokens(block["input_ids"]) == ["the", "cat", "[SEP]", "e", "[SEP]"]
    assert block["num_bytes"] == len(b"  cat\n") + len("É".encode())


def test_blocks_are_packed_once(bytes_tokenizer, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "one"}\n{"text": "two"}')
    bytes_tokenizer.save_pretrained(tmp_path / "tokenizer")
    files = []
    for _ in range(2):
        documents = Dataset.from_json(str(tmp_path / "text.jsonl"), cache_dir=str(tmp_path / "cache"))
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
        files.append(pack_causal_blocks(documents, tokenizer, 4).cache_files)
    assert files[0] == files[1] != documents.cache_files


def test_a_tokenizer_without_end_or_offsets_and_a_block_that_predicts_nothing_are_errors(bytes_tokenizer):
    documents = Dataset.from_dict({"body": DOCUMENTS})
    with pytest.raises(ValueError, match=r"no column 'text', only \['body'\]"):
        pack_causal_blocks(documents, bytes_tokenizer, 6)
    with pytest.raises(ValueError, match="block_size is 1"):
        pack_causal_blocks(documents, bytes_tokenizer, 1, text_column="body")
    with pytest.raises(ValueError, match="has no end-of-sequence token"):
        pack_causal_blocks(documents, AutoTokenizer.from_pretrained(VOCABULARY), 6, text_column="body")
    with pytest.raises(ValueError, match="does not say which text a token stands for"):
        pack_causal_blocks(documents, ByT5Tokenizer(), 6, text_column="body")
