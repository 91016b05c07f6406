"""Files, globs, folders and Hub sets are read alike, and what is missing is named."""

import csv
import json

import pytest
from datasets import Dataset

from hf_curriculum_distill.tasks.reading import check_text, num_held_out, read_dataset


def test_files_are_read_as_they_are(tmp_path):
    rows = [["text", "label"], ['said "so, and', "none"], ["null", "all"]]
    with open(tmp_path / "one.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    (tmp_path / "two.tsv").write_text("\n".join(map("\t".join, rows)))
    for name in ("one.csv", "two.tsv", "tw*.tsv"):
        train = read_dataset(str(tmp_path / name))["train"]
        assert [train.column_names, *map(list, zip(train["text"], train["label"], strict=True))] == rows
    with pytest.raises(ValueError, match=r"files of several kinds, \.csv, \.tsv"):
        read_dataset(str(tmp_path))


def write(path, *texts):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jsonl", {"train": ["a", "e"], "test": ["b"], "validation": ["c"]}),  # by name, as in a folder
        ("**/*.jsonl", {"train": ["a", "d", "e"], "test": ["b"], "validation": ["c"]}),
        ("test*.jsonl", {"train": ["b"]}),  # the user wants just these
        ("latest.jsonl", {"train": ["e"]}),
        ("test-1.jsonl", {"train": ["b"]}),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_glob_keeps_test_files_out_of_the_training_set(tmp_path, pattern, expected, streaming):
    for name, text in {"train-0": "a", "test-1": "b", "dev": "c", "train/more": "d", "latest": "e"}.items():
        write(tmp_path / f"{name}.jsonl", text)
    splits = read_dataset(str(tmp_path / pattern), streaming=streaming)
    assert {name: sorted(row["text"] for row in rows) for name, rows in splits.items()} == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none.csv", r"none.csv is no such file; name files, or a folder, of one of \.tsv, \.csv"),
        ("./some/folder", r"some/folder is no such file"),
        ("texts/*.txt", r"texts/\*\.txt is no such file"),
        ("owner/name", r"owner/name is no file or folder here, and the Hub is out of reach: "),
    ],
)
def test_what_is_not_there_is_named(source, message):
    with pytest.raises(OSError, match=message):  # tests are offline
        read_dataset(source)


def test_held_out_are_2000_or_a_tenth():
    assert [num_held_out("some", rows) for rows in (10, 19, 20_000, 10**6)] == [1, 1, 2000, 2000]
    assert num_held_out("some", 100, wanted=99) == 99
    for rows, wanted in ((9, None), (100, 100), (100, 0)):
        with pytest.raises(ValueError, match=f"some has {rows} texts, too few to hold"):
            num_held_out("some", rows, wanted=wanted)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_that_is_missing_or_no_text_is_named(tmp_path, streaming):
    write(tmp_path / "some.jsonl", 1, 2)
    data = read_dataset(str(tmp_path / "some.jsonl"), streaming=streaming)["train"]
    with pytest.raises(ValueError, match=r"The column 'text' of some holds int64, no text; name one of text \(int64\)"):
        check_text("some", data, "text")
    with pytest.raises(
        ValueError, match=r"The column 'body' of some is not there; name one of text \(int64\) with --t"
    ):
        check_text("some", data, "body")
    check_text("some", Dataset.from_dict({"body": ["a"]}), "body")


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "some.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"some.jsonl can't be read as a data set: "):
        read_dataset(str(tmp_path / "some.jsonl"))
    write(tmp_path / "folder/test.jsonl", "a")
    with pytest.raises(ValueError, match=r"folder has the splits test, but none to train on"):
        read_dataset(str(tmp_path / "folder"))
