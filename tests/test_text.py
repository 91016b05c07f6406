from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

from hf_curriculum_distill.tasks.text import MaskedBlocksCollator, mask_once, pack_blocks

VOCABULARY = Path(__file__).parents[1] / "recipes/data/bert_uncased"
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
