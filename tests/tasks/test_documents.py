"""Documents come from files of any kind; none is both trained on and held out."""

import json
from itertools import islice

import pytest
from datasets import Dataset, IterableDataset

from hf_curriculum_distill.options import TextOptions
from hf_curriculum_distill.tasks.documents import evaluated_blocks, load_documents

TEXTS = [f"document {number}" for number in range(40)]


def write(folder, name, kind, texts=TEXTS):
    path = folder / f"{name}.{kind}"
    if kind == "parquet":
        Dataset.from_dict({"text": texts}).to_parquet(path)
    else:
        path.write_text("\n".join(json.dumps({"text": text}) if kind == "jsonl" else text for text in texts))
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize("given", ["folder", "file"])
def test_some_documents_of_a_text_are_held_out(tmp_path, kind, streaming, given):
    file = write(tmp_path, "some", kind)
    options = TextOptions(dataset=str(tmp_path if given == "folder" else file), heldout_documents=8)
    train, heldout = load_documents(options, streaming)
    assert isinstance(train, IterableDataset) == streaming
    trained_on = [row["text"] for row in (islice(train, 64) if streaming else train)]
    held_out = [row["text"] for row in heldout]
    assert len(held_out) == 8 and set(trained_on) | set(held_out) == set(TEXTS)
    assert not set(trained_on) & set(held_out)
    if streaming:  # without end, so that no process runs out of data before another
        assert len(set(trained_on)) == 32


@pytest.mark.parametrize("streaming", [False, True])
def test_a_validation_split_is_what_is_held_out(tmp_path, streaming):
    write(tmp_path, "train", "jsonl", TEXTS[:30])
    write(tmp_path, "validation", "jsonl", TEXTS[30:])
    options = TextOptions(dataset=str(tmp_path), train_documents=12, heldout_documents=3)
    train, heldout = load_documents(options, streaming)
    assert [row["text"] for row in heldout] == TEXTS[30:]
    assert {row["text"] for row in islice(train, 24)} == set(TEXTS[:12])


def test_more_documents_than_there_are_is_all_of_them(tmp_path):
    write(tmp_path, "train", "txt", TEXTS[:30])
    write(tmp_path, "validation", "txt", TEXTS[30:])
    assert len(load_documents(TextOptions(dataset=str(tmp_path), train_documents=1000))[0]) == 30


@pytest.mark.parametrize("num_blocks, tested, validated", [(10, 4, 4), (6, 4, 2), (3, 3, 0)])
def test_no_block_is_in_both_the_test_and_the_validation_set(num_blocks, tested, validated):
    blocks = Dataset.from_dict({"input_ids": [[number] for number in range(num_blocks)]})
    test = evaluated_blocks(blocks, TextOptions(eval_blocks=4))
    assert test["input_ids"][:] == [[number] for number in range(tested)]
    options = TextOptions(eval_blocks=4, evaluate_on="validation", block_size=7)
    if validated:
        expected = [[number] for number in range(tested, tested + validated)]
        assert evaluated_blocks(blocks, options)["input_ids"][:] == expected
    else:
        with pytest.raises(ValueError, match="fills no block of 7 tokens for the validation set; raise --heldout_doc"):
            evaluated_blocks(blocks, options)


def test_a_set_that_is_neither_is_refused():
    with pytest.raises(ValueError, match="evaluate_on is 'train'; use 'test' or 'validation'"):
        TextOptions(evaluate_on="train")
