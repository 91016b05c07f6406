"""What a training shows while it runs, in a terminal and in a notebook: which stage it is in, and its calibration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback


def name_stage(callbacks: Sequence[TrainerCallback], name: str) -> None:
    """Have the progress bar of a training name a stage.

    Args:
        callbacks: of the trainer.
        name: of the stage.
    """
    for callback in callbacks:
        if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
            callback.training_bar.set_description(name)
    for tracker in _notebook_trackers(callbacks):
        tracker.prefix = name


def name_stage_in_table(callbacks: Sequence[TrainerCallback], name: str) -> None:
    """In a notebook, add the stage to the last line of the table of losses.

    Args:
        callbacks: of the trainer.
        name: of the stage.
    """
    for tracker in _notebook_trackers(callbacks):
        columns, *lines = tracker.inner_table or [[]]
        if lines:  # a line of the same step is changed, not added
            tracker.write_line({columns[0]: lines[-1][0], "Stage": name})


def progress_bar(batches: Iterable[Any], description: str, shown: bool) -> Iterable[Any]:
    """The same batches, with a progress bar that goes away at their end.

    Args:
        batches: with a length.
        description: of the bar.
        shown: whether there is a bar.
    """
    return tqdm(batches, description, leave=False, dynamic_ncols=True, disable=not shown)


def _notebook_trackers(callbacks: Sequence[TrainerCallback]) -> Iterator[Any]:
    """Those of `NotebookProgressCallback`, whose module needs IPython."""
    trackers = (getattr(callback, "training_tracker", None) for callback in callbacks)
    return (tracker for tracker in trackers if tracker is not None)
