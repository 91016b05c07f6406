"""A teacher's checkpoints, one after another: progressive distillation."""

from __future__ import annotations

import hashlib
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence

from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_curriculum_distill.layers.weights import weights_fingerprint
from hf_curriculum_distill.teachers.teacher import Teacher


class CheckpointTeacher(Teacher):
    """Checkpoints of a teacher's own training, one after another (Panigrahi et al., 2025).

    One model is in memory, and its weights are replaced. Evaluations compare with the last checkpoint.

    Args:
        folders: the checkpoints, in the order of their training.
        load: loads the model of one folder, checked and on its device.
        schedule: see the config's `teacher_schedule`.
        stack: see [`Teacher`].

    Raises:
        ValueError: the checkpoints are of different sizes, or the schedule doesn't fit them.
    """

    def __init__(
        self,
        folders: Sequence[str],
        load: Callable[[str], PreTrainedModel],
        schedule: str | list[int | float],
        stack: str = "encoder",
    ):
        self._folders, self._load, self._schedule = list(folders), load, schedule
        check_schedule(self._folders, schedule)
        digest, sizes = hashlib.sha256(), None
        for folder in self._folders:
            model = load(folder)
            own_sizes = {name: tensor.shape for name, tensor in model.state_dict().items()}
            sizes = sizes or own_sizes
            if own_sizes != sizes:
                raise ValueError(
                    f"{self._folders[0]} and {folder} are models of different sizes; one model in memory takes the "
                    "weights of each checkpoint in turn, so pass checkpoints of one training run."
                )
            digest.update(weights_fingerprint(model).encode())
        super().__init__(model, ", ".join(self._folders), stack)
        self.identity  # noqa: B018  the last checkpoint's
        self.fingerprint = digest.hexdigest()
        self._index = len(self._folders) - 1
        self._ends: list[int] | None = None

    def advance(self, step: int | None) -> None:
        index = len(self._folders) - 1 if step is None else bisect_right(self._ends, step)
        if index != self._index:
            self.model.load_state_dict(self._load(self._folders[index]).state_dict())
            self._index = index

    def plan(self, max_steps: int) -> None:
        """Compute the student's step at which each checkpoint but the last stops teaching."""
        self._ends = schedule_ends(self._folders, self._schedule, max_steps)


def check_schedule(folders: Sequence[str], schedule: str | Sequence[int | float]) -> None:
    """Raise a `ValueError` if the schedule does not say when each of the checkpoints teaches.

    Args:
        folders, schedule: see [`CheckpointTeacher`].
    """
    if not isinstance(schedule, str):
        if len(schedule) != len(folders) - 1:
            raise ValueError(
                f"teacher_schedule has {len(schedule)} ends for {len(folders)} checkpoints; give one end for each but "
                "the last."
            )
    elif len(folders) > 1:
        steps = [_steps_of(folder) for folder in folders]
        if None in steps or sorted(set(steps)) != steps:
            raise ValueError(
                f"teacher_schedule={schedule!r} needs folders named {PREFIX_CHECKPOINT_DIR}-STEP in increasing order, "
                f"but the checkpoints are {', '.join(folders)}; set teacher_schedule to the list of steps at which "
                "each but the last stops teaching."
            )


def schedule_ends(folders: Sequence[str], schedule: str | Sequence[int | float], max_steps: int) -> list[int]:
    """The student's step at which each checkpoint but the last stops teaching.

    Args:
        folders, schedule: see [`CheckpointTeacher`].
        max_steps: the student's number of optimizer steps.

    Raises:
        ValueError: the steps are not in increasing order, or not below `max_steps`.

    ```python
    >>> schedule_ends(["checkpoint-10", "checkpoint-30", "checkpoint-40"], "fraction", max_steps=80)
    [20, 60]

    ```
    """
    if len(folders) == 1:
        return []
    if isinstance(schedule, str):
        steps = [_steps_of(folder) for folder in folders]
        return [step if schedule == "step" else round(step * max_steps / steps[-1]) for step in steps[:-1]]
    ends = [round(end * max_steps) if isinstance(end, float) else end for end in schedule]
    if sorted(set(ends)) != ends or any(not 0 < end < max_steps for end in ends):
        raise ValueError(
            f"teacher_schedule is {schedule} (steps {ends} of {max_steps}); each checkpoint must stop teaching after "
            "the one before it and before max_steps."
        )
    return ends


def find_checkpoints(name: str) -> list[str]:
    """The `checkpoint-STEP` folders in a folder, in the order of their steps; `[name]` if it is a model itself.

    Raises:
        ValueError: the folder has neither checkpoints nor a model.
    """
    if not os.path.isdir(name):
        return [name]
    steps = {_steps_of(entry): entry for entry in os.listdir(name) if os.path.isdir(os.path.join(name, entry))}
    if checkpoints := [os.path.join(name, steps[step]) for step in sorted(step for step in steps if step is not None)]:
        return checkpoints
    if os.path.isfile(os.path.join(name, "config.json")):
        return [name]
    there = ", ".join(sorted(os.listdir(name))[:8]) or "nothing"
    raise ValueError(
        f"{name} has no {PREFIX_CHECKPOINT_DIR}-STEP folders to learn from progressively, only: {there}; pass the "
        "output_dir of the teacher's training, or a list of folders."
    )


def _steps_of(folder: str) -> int | None:
    match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", os.path.basename(os.path.normpath(folder)))
    return int(match[1]) if match else None
