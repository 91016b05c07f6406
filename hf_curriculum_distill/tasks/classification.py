"""Text classification: labelled texts of one task, and the sentences of any other text."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset
from transformers import PreTrainedTokenizerBase

from hf_curriculum_distill.tasks.reading import find_column, num_held_out, read_dataset


@dataclass(frozen=True)
class Task:
    """Labelled texts to train on and others that are held out.

    Args:
        source: the data set's name, for errors.
        train, heldout: data sets with the columns `text` and `label`.
        names: `label -> name`, in the order of the classes.
    """

    source: str
    train: Dataset
    heldout: Dataset
    names: dict[Any, str]


def read_task(
    source: str,
    config: str | None = None,
    heldout_name: str = "test",
    text_column: str | None = None,
    label_column: str | None = None,
) -> Task:
    """Read the training texts and the held-out ones, and check that they describe one task.

    Splits that the data set lacks are held out of the training texts, 2,000 or 10 %, by a fixed seed.

    Args:
        source, config: see [`~hf_curriculum_distill.tasks.reading.read_dataset`].
        heldout_name: "test" or "validation".
        text_column, label_column: names of columns, if these are not clear.

    Raises:
        OSError, ValueError: the data cannot be read, or are no task; the error says what is missing.
    """
    splits = read_dataset(source, config)
    columns = splits["train"].features
    label = find_column(source, columns, "label_column", label_column)
    others = {name: kind for name, kind in columns.items() if name != label}
    text = find_column(source, others, "text_column", text_column)
    for split in ("test", "validation"):
        if split not in splits:
            train = splits["train"]
            number = num_held_out(source, len(train), split)
            splits["train"], splits[split] = train.train_test_split(test_size=number, seed=0).values()
    for split in ("train", heldout_name):
        if missing := {text, label} - {*splits[split].column_names}:
            raise ValueError(f"The {split} set of {source} has no column {missing.pop()!r}, as the training set has.")
    train, heldout = (
        splits[split].select_columns([text, label]).rename_columns({text: "text", label: "label"})
        for split in ("train", heldout_name)
    )
    labels, heldout_labels = set(train["label"]), set(heldout["label"])
    if None in labels | heldout_labels or any(None in part["text"] for part in (train, heldout)):
        raise ValueError(f"{source} has rows without a {text} or a {label}; fill them in, or leave them out.")
    if len(labels) < 2:
        raise ValueError(
            f"All training texts of {source} have the {label} {min(labels)!r}; a classifier needs two or more classes."
        )
    if unknown := heldout_labels - labels:
        raise ValueError(
            f"The {heldout_name} set of {source} has the {label} {min(unknown)!r}, which no training text has; correct "
            "it, or evaluate on another set with --evaluate_on."
        )
    if isinstance(columns[label], ClassLabel):
        return Task(source, train, heldout, dict(enumerate(columns[label].names)))
    return Task(source, train, heldout, {value: str(value) for value in sorted(labels)})


def encode_task(
    task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int, classes: Mapping[int, str], teacher: str
) -> tuple[Dataset, Dataset]:
    """A task's training and held-out texts as tokens, and their labels as the teacher's classes.

    Args:
        task: see [`read_task`].
        tokenizer: of the models.
        max_length: tokens after which a text is cut.
        classes: the teacher's, by number.
        teacher: its name, for errors.

    Returns:
        two data sets with the columns of the tokenizer and `labels`.

    Raises:
        ValueError: the teacher has other classes than the task.
    """
    numbers = class_numbers(task, classes, teacher)
    train, heldout = (
        encode(part, "text", tokenizer, max_length).add_column("labels", [numbers[label] for label in part["label"]])
        for part in (task.train, task.heldout)
    )
    return train, heldout


def class_numbers(task: Task, classes: Mapping[int, str], teacher: str) -> dict[Any, int]:
    """The teacher's class of each label: the one of its name or, where labels are whole numbers, of its number.

    Arguments and errors as of [`encode_task`].
    """
    known = {name: number for number, name in classes.items()}
    if {*task.names.values()} <= known.keys():
        return {value: known[name] for value, name in task.names.items()}
    if all(type(value) is int and value in classes for value in task.names):
        return {value: value for value in task.names}
    raise ValueError(
        f"{teacher} knows the classes {', '.join(known)}, but {task.source} has {', '.join(task.names.values())}; use "
        "a teacher that was trained on these, or correct the labels."
    )


def encode(texts: Dataset, column: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Tokenize a column of texts; all other columns are left out."""
    return texts.map(
        lambda batch: tokenizer(batch[column], truncation=True, max_length=max_length),
        batched=True,
        remove_columns=texts.column_names,
    )


def draw_sentences(documents: Dataset, column: str, count: int, seed: int) -> list[str]:
    """Sentences of documents in a random order, `count` of them at most, cut where ., ! or ? or a line ends."""
    sentences: list[str] = []
    for index in epochs(len(documents), len(documents), seed).tolist():
        if len(sentences) >= count:
            break
        parts = re.split(r"(?<=[.!?])\s+|\n+", documents[index][column] or "")
        sentences += [part.strip() for part in parts if part.strip()]
    return sentences[:count]


def epochs(num_rows: int, count: int, seed: int) -> np.ndarray:
    """`count` row numbers: all rows in a random order, then in another, and so on."""
    draw = np.random.default_rng(seed)
    orders = [draw.permutation(num_rows) for _ in range(math.ceil(count / num_rows))]
    return np.concatenate([np.empty(0, np.int64), *orders])[:count]
