"""Text with one label a text, for classification: files or Hub data sets -> training set, held-out set, classes."""

from __future__ import annotations

import glob
import os
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset

# In the names of files and splits, between characters that are no letters; as in `datasets`.
_SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
_LARGEST_HELDOUT = 2000
# "NA" and "null" are words, and in tab-separated files quotes are characters like any other
_CSV = {"keep_default_na": False}
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", _CSV),
    ".tsv": ("csv", {"delimiter": "\t", "quoting": 3} | _CSV),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}


@dataclass(frozen=True)
class LabelledText:
    """A classification task.

    Args:
        train: rows with `text` and, as its name, `label`.
        heldout: the same, of examples that are evaluated.
        classes: the names of the labels, in order.
    """

    train: Dataset
    heldout: Dataset
    classes: list[str]

    @property
    def majority_share(self) -> float:
        """What always guessing the most frequent label of the held-out set would get right."""
        return max(Counter(self.heldout["label"]).values()) / len(self.heldout)


def read_labelled_text(
    dataset: str,
    config: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    heldout: str = "test",
) -> LabelledText:
    """Read a classification task.

    One row: `{"text": "a stirring , funny film", "label": "1"}`.

    Args:
        dataset, config: see [`read_splits`]. Of the training set, a tenth (at most 2,000 rows), drawn with a fixed
            seed, becomes the test set if there is none, and another tenth the validation set.
        text_column, label_column: their names; None where there is one obvious choice.
        heldout: what is evaluated: "validation" or "test".

    Raises:
        OSError: there is no such data set.
        ValueError: a column cannot be found or is of another kind, a row lacks its text or label, the training set has
            one class or nearly as many as rows, or the held-out set has a class that the training set lacks.
    """
    splits = hold_out(read_splits(dataset, config))
    columns = find_columns(splits["train"].features, text_column, label_column)
    train, evaluated = (_normalise(splits[name], name, *columns) for name in ("train", heldout))
    classes = [*dict.fromkeys(train["label"])]
    if isinstance(known := splits["train"].features[columns[1]], ClassLabel):
        classes.sort(key=known.names.index)
    else:
        classes.sort(key=lambda name: (int(name), "") if re.fullmatch(r"-?\d+", name) else (float("inf"), name))
    if len(classes) < 2:
        raise ValueError(
            f"All {len(train)} training texts have the label {classes[0]!r}, so there is nothing to tell apart; give "
            "data with two classes or more."
        )
    if 2 * len(classes) > len(train):
        raise ValueError(
            f"The column {columns[1]!r} has {len(classes)} different values in {len(train)} training rows, too many "
            "for classes; name the one that holds the labels with label_column."
        )
    if unknown := sorted({*evaluated["label"]} - {*classes}):
        raise ValueError(
            f"The {heldout} set has the label {unknown[0]!r}, but the training set has only {_join(classes)}; correct "
            "the data, or evaluate on the other held-out set."
        )
    return LabelledText(train, evaluated, classes)


def read_sentences(dataset: str, config: str | None, text_column: str | None, number: int, seed: int) -> list[str]:
    """Read sentences of documents without labels, in random order of the documents.

    Documents are cut after `.`, `!` or `?` before a space, and at line breaks. Sentences of one to three words, most of
    them headings, are left out.

    Args:
        dataset, config, text_column: as in [`read_labelled_text`]; only the training set is read.
        number: of sentences, at most.
        seed: of the documents' order.

    Raises:
        OSError: there is no such data set.
        ValueError: it has no training set, no text, or no such column.
    """
    splits = read_splits(dataset, config)
    if "train" not in splits:
        raise ValueError(f"{dataset} has no training set, only {_join(splits)}; give one that has.")
    documents = splits["train"]
    column = find_text_column(documents.features, text_column)
    documents = documents.select_columns(column)
    order, sentences = [*range(len(documents))], []
    random.Random(seed).shuffle(order)
    for index in order:
        if len(sentences) >= number:
            break
        parts = re.split(r"(?<=[.!?])\s+|\n+", documents[index][column] or "")
        sentences += [part.strip() for part in parts if len(part.split()) > 3]
    if not sentences:
        raise ValueError(f"The column {column!r} of {dataset} holds no sentence of more than three words.")
    return sentences[:number]


def number_classes(classes: Sequence[str], id2label: Mapping[int, str] | None = None) -> dict[int, str]:
    """Number the classes of a task, as a model does that was trained on it.

    Args:
        classes: their names, in order.
        id2label: the model's numbers and names; None to number them in order.

    Returns:
        `number -> name` in the task. Names are those of the model in any case; where the model has none ("LABEL_0"), or
        the task's are numbers from 0, they are in the order of the model's numbers.

    Raises:
        ValueError: the model has other classes.

    ```python
    >>> number_classes(["bad", "good"], {0: "GOOD", 1: "BAD"})
    {0: 'good', 1: 'bad'}
    >>> number_classes(["0", "1"], {0: "NEGATIVE", 1: "POSITIVE"})
    {0: '0', 1: '1'}

    ```
    """
    if id2label is None:
        return dict(enumerate(classes))
    names = {int(number): str(name) for number, name in id2label.items()}
    ours = {name.casefold(): name for name in classes}
    if {name.casefold() for name in names.values()} == {*ours} and len(names) == len(classes):
        return {number: ours[name.casefold()] for number, name in sorted(names.items())}
    unnamed = all(name == f"LABEL_{number}" for number, name in names.items())
    numbered = list(classes) == [str(number) for number in range(len(classes))]
    if {*names} == {*range(len(classes))} and (unnamed or numbered):
        return dict(enumerate(classes))
    raise ValueError(
        f"The teacher tells apart {_join(names.values())}, but the labels of the data are {_join(classes)}; use a "
        "teacher of these, or train one."
    )


def read_splits(dataset: str, config: str | None = None) -> DatasetDict:
    """Read a data set from local files or the Hub.

    Args:
        dataset: a CSV, TSV, JSON, Parquet or text file; a glob of such files; a folder; or a name on the Hub. Files
            belong to the split that their names say ("train", "validation", "test", or other words for these), and
            are training data where no name does. In TSV files quotes have no meaning, and in CSV files "NA" has none.
        config: configuration of a data set on the Hub, or of a folder that is a copy of one.

    Raises:
        OSError: there is no such data set, or it cannot be read.
        ValueError: the files are of several kinds.
    """
    files = [] if config is not None else _find_files(dataset)
    kinds = sorted({os.path.splitext(path)[1] for paths in files for path in files[paths]} if files else ())
    if len(kinds) > 1:
        raise ValueError(
            f"The files of {dataset} are of several kinds ({_join(kinds)}); name those of one kind, for instance by "
            f"{os.path.join(dataset, '*' + kinds[0])}."
        )
    try:
        if not kinds:
            return load_dataset(dataset, config)
        reader, options = _READERS[kinds[0]]
        return load_dataset(reader, data_files=files, **options)
    except Exception as error:  # of any kind: each format and the Hub raise their own
        cause = error.__cause__ or error
        raise OSError(
            f"The data set {dataset!r} cannot be read ({' '.join(str(cause).split())[:300]}); give a file, glob or "
            f"folder of {_join(_READERS)}, or a data set on the Hub and the configuration it needs."
        ) from error


def hold_out(splits: Mapping[str, Dataset], seed: int = 0) -> dict[str, Dataset]:
    """Make `train`, `validation` and `test` of the splits that there are.

    Args:
        splits: by their names, such as "train" and "validation_matched".
        seed: of the rows that are taken from the training set for those that are missing.

    Returns:
        the three splits, of which no two share a row of the data set.

    Raises:
        ValueError: there is no training set, or fewer than 10 rows to hold some out of.
    """
    found: dict[str, Dataset] = {}
    for name, rows in splits.items():
        if (split := _split_of(name)) is not None:
            found.setdefault(split, rows)
    if "train" not in found:
        raise ValueError(f"The data set has no training set, only {_join(splits)}; give one that has.")
    number = min(_LARGEST_HELDOUT, len(found["train"]) // 10)
    for name in ("test", "validation"):
        if name in found:
            continue
        if not number:
            raise ValueError(
                f"The training set has {len(found['train'])} rows, too few to hold a tenth out as {name} set; give a "
                f"{name} set, too."
            )
        parts = found["train"].train_test_split(test_size=number, seed=seed)
        found |= {"train": parts["train"], name: parts["test"]}
    return found


def find_columns(features: Features, text: str | None = None, label: str | None = None) -> tuple[str, str]:
    """Find the columns with text and label.

    Args:
        features: the columns of a data set and what they hold.
        text, label: the names that are known.

    Returns:
        Text and label. The obvious ones are called "text" or "sentence" and "label" or "labels", or the only one with
        strings beside the label, or the only one beside the text.

    Raises:
        ValueError: a name is unknown, the text is none, or a choice is not obvious.
    """
    if label is None:
        label = _only(name for name in ("label", "labels") if name in features)
    text = find_text_column(features, text, label)
    label = label or _only(name for name in features if name != text)
    if label not in features:
        raise _unclear("label", label, features)
    return text, label


def find_text_column(features: Features, text: str | None = None, label: str | None = None) -> str:
    """Find the column with text: see [`find_columns`]."""
    strings = [name for name, kind in features.items() if getattr(kind, "dtype", None) in ("string", "large_string")]
    if text is None:
        texts = [name for name in strings if name != label]
        text = _only(name for name in ("text", "sentence") if name in texts) or _only(texts)
    if text not in features:
        raise _unclear("text", text, features)
    if text not in strings:
        raise ValueError(f"The column {text!r} holds {features[text]}, no text; name another one with text_column.")
    return text


def _only(names: Any) -> str | None:
    names = list(names)
    return names[0] if len(names) == 1 else None


def _unclear(what: str, given: str | None, features: Features) -> ValueError:
    problem = f"no column {given!r}" if given is not None else f"no obvious {what} among its columns"
    return ValueError(f"The data set has {problem}; name one of {_join(features)} with {what}_column.")


def _normalise(rows: Dataset, split: str, text: str, label: str) -> Dataset:
    """The rows as `text` and the name of their `label`."""
    if missing := [name for name in (text, label) if name not in rows.column_names]:
        raise ValueError(f"The {split} set has no column {missing[0]!r}, only {_join(rows.column_names)}.")
    kind = rows.features[label]
    names = kind.names if isinstance(kind, ClassLabel) else None
    if not re.match("u?int|bool|(large_)?string", str(getattr(kind, "dtype", None))):
        raise ValueError(f"The column {label!r} holds {kind}; labels are words or whole numbers, one a text.")

    def normalise(batch: Mapping[str, list], indices: list[int]) -> dict[str, list[str]]:
        texts, labels = batch[text], batch[label]
        if names is not None:  # -1 means that the label is kept secret
            labels = [None if number is None or number < 0 else names[number] for number in labels]
        for name, values in ((text, texts), (label, labels)):
            for index, value in zip(indices, values, strict=True):
                if value is None or (name == label and value == ""):
                    raise ValueError(
                        f"Row {index + 1} of the {split} set has no {name}; leave such rows out, or use another set."
                    )
        return {"text": texts, "label": [str(value) for value in labels]}

    features = Features({"text": Value("string"), "label": Value("string")})
    return rows.map(normalise, True, batched=True, remove_columns=rows.column_names, features=features)


def _find_files(dataset: str) -> dict[str, list[str]]:
    """Local files by split, and none for a name on the Hub."""
    if os.path.isfile(dataset):
        return {"train": [dataset]}
    pattern, base = dataset, os.path.dirname(dataset)
    if os.path.isdir(dataset):
        pattern, base = os.path.join(glob.escape(dataset), "**", "*"), dataset
    elif not glob.has_magic(dataset):
        return {}
    paths = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.splitext(path)[1] in _READERS)
    files: dict[str, list[str]] = {}
    for path in paths:
        if (split := _split_of(os.path.relpath(path, base or "."))) is not None:
            files.setdefault(split, []).append(path)
    return files or ({"train": paths} if paths else {})


def _split_of(name: str) -> str | None:
    words = {*re.split(r"[^a-z]+", name.lower())}
    return next((split for split, keywords in _SPLITS.items() if words & keywords), None)


def _join(names: Any) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:10]) + (" ..." if len(names) > 10 else "")
