"""Data sets of files or of the Hub, and their columns; whatever is missing is named."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Mapping, Sequence
from glob import escape, glob, has_magic
from itertools import islice
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError

_CSV = {"keep_default_na": False}  # a text may be "None", "null" or "nan"
# suffix -> kind of file, and how it is read; quotation marks in a TSV are part of the text
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".tsv": ("csv", {**_CSV, "sep": "\t", "quoting": csv.QUOTE_NONE}),
    ".csv": ("csv", _CSV),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}
TEXT_NAMES, LABEL_NAMES = ("text", "sentence"), ("label", "labels")  # usual names of columns
# as `datasets` knows them in the names of a folder's files
_SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "dev", "val"},
    "test": {"test", "testing", "eval", "evaluation"},
}
MOST_HELD_OUT = 2000


def read_dataset(source: str, config: str | None = None, streaming: bool = False) -> DatasetDict | IterableDatasetDict:
    """Read the splits of a file, a glob, a folder or a Hub data set.

    A single file is a training set, and so are files of a glob that all are of one split. Other files belong to the
    split that their names or folders say: `train`, `validation` (or `dev`, `val`), `test`; else to the training set.

    Args:
        source: path, pattern or name.
        config: configuration on the Hub.
        streaming: whether to read while rows are used instead of before.

    Raises:
        FileNotFoundError: there is no such file, folder or data set.
        ConnectionError: it is none of this machine, and the Hub is out of reach.
        ValueError: files are of several kinds or cannot be read, or nothing is there to train on.
    """
    is_folder, known = os.path.isdir(source), ", ".join(READERS)
    files = [source] if os.path.isfile(source) else []
    if has_magic(source) and not files:
        files = sorted(filter(os.path.isfile, glob(source, recursive=True)))
    inside = files or (glob(os.path.join(escape(source), "**"), recursive=True) if is_folder else [])
    suffixes = {suffix for suffix in (os.path.splitext(file)[1] for file in inside) if suffix in READERS}
    if not (inside or re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source)) or (
        not inside and os.path.splitext(source)[1] in READERS
    ):
        raise FileNotFoundError(f"{source} is no such file; name files, or a folder, of one of {known}.")
    if len(suffixes) > 1:
        raise ValueError(
            f"{source} is files of several kinds, {', '.join(sorted(suffixes))}; name files, or a folder, of one of "
            f"{known}."
        )
    kind, options = READERS[suffixes.pop()] if suffixes else (None, {})
    try:
        if files and kind is not None:
            splits = load_dataset(kind, data_files=_by_split(files), streaming=streaming, **options)
        elif files:  # compressed, for instance
            splits = load_dataset(os.path.dirname(source) or ".", data_files=files, streaming=streaming)
        else:
            splits = load_dataset(source, config, streaming=streaming, **options)
    except (OSError, ValueError, DatasetGenerationError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        if inside or not isinstance(error, OSError):
            raise ValueError(f"{source} can't be read as a data set: {reason}") from error
        if isinstance(error, ConnectionError):
            raise ConnectionError(
                f"{source} is no file or folder here, and the Hub is out of reach: {reason}"
            ) from error
        raise FileNotFoundError(
            f"{source} is neither a file or folder here nor a data set of the Hub: {reason}"
        ) from error
    if "train" not in splits:
        raise ValueError(f"{source} has the splits {', '.join(splits)}, but none to train on; name its file 'train'.")
    return splits


def _by_split(files: Sequence[str]) -> dict[str, list[str]]:
    together = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    found: dict[str, list[str]] = {}
    for file in files:
        words = {*re.split(r"[^a-z]+", os.path.relpath(file, together).lower())}
        split = next((split for split, names in _SPLITS.items() if names & words), "train")
        found.setdefault(split, []).append(file)
    return found if len(found) > 1 else {"train": [*files]}


def num_held_out(source: str, num_rows: int, what: str = "validation", wanted: int | None = None) -> int:
    """How many rows to hold out of a training set: by default 2,000 or 10 %, whichever is less.

    Args:
        source: the data set, for the error.
        num_rows: of the training set.
        what: is made of them, for the error.
        wanted: their number, if the user has set it.

    Raises:
        ValueError: there are too few rows.
    """
    number = min(MOST_HELD_OUT, num_rows // 10) if wanted is None else wanted
    if not 0 < number < num_rows:
        asked = "some" if wanted is None else f"{wanted:,}"
        raise ValueError(f"{source} has {num_rows:,} texts, too few to hold {asked} out as {what} set.")
    return number


def find_features(data: Dataset | IterableDataset) -> Mapping[str, Any]:
    """The type of each column, by name; of a stream of files that do not say it, that of its first row."""
    if data.features is not None:
        return data.features
    return Dataset.from_list([*islice(data, 1)]).features


def check_text(source: str, data: Dataset | IterableDataset, column: str) -> None:
    """Check that a column is there and holds text.

    Args:
        source: the data set, for the error.
        data: its rows.
        column: that is to hold the text.

    Raises:
        ValueError: it does not; names the columns that there are.
    """
    kinds = _kinds(find_features(data))
    if kinds and kinds.get(column) != "string":
        there = f"holds {kinds[column]}, no text" if column in kinds else "is not there"
        raise ValueError(f"The column {column!r} of {source} {there}; name one of {_listed(kinds)} with --text_column.")


def find_column(source: str, columns: Mapping[str, Any], option: str, given: str | None) -> str:
    """The column of texts or labels: the one that is given, has a usual name, or is the only one of its kind.

    Args:
        source: the data set, for the error.
        columns: name -> feature.
        option: that names the column, `label_column` for that of labels.
        given: its value, if the user has set it.

    Raises:
        ValueError: there is no such column, or several could be it.
    """
    kinds = _kinds(columns)
    strings = [name for name, kind in kinds.items() if kind == "string"]
    numbers = [name for name, kind in kinds.items() if re.match("u?int|bool", kind)]
    if option == "label_column":
        fitting, usual = [*numbers, *strings], LABEL_NAMES
        others = numbers or [name for name in strings if name not in TEXT_NAMES]
    else:
        fitting, usual, others = strings, TEXT_NAMES, strings
    if given is not None:
        found = [name for name in fitting if name == given]
    else:
        found = [name for name in fitting if name in usual] or others
    if len(found) != 1:
        what = "labels" if option == "label_column" else "texts"
        problem = "is not clear" if given is None else f"can't be {given!r}"
        raise ValueError(
            f"Which column of {source} holds the {what} {problem}; name one of {_listed(kinds)} with --{option}."
        )
    return found[0]


def _kinds(columns: Mapping[str, Any]) -> dict[str, str]:
    return {n: getattr(kind, "dtype", type(kind).__name__).removeprefix("large_") for n, kind in columns.items()}


def _listed(kinds: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
