"""Who teaches: a frozen model, or its checkpoints one after another."""

from __future__ import annotations

import hashlib
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_curriculum_distill.layers import PartialForward


class FrozenTeacher:
    """A trained model that only answers: in eval mode, without gradients, never part of the student.

    Args:
        model: the teacher. It is put into eval mode and its parameters stop requiring gradients.
        name: where it came from, for the records of a run.
        stack: of an encoder-decoder, the one whose blocks are matched.
    """

    def __init__(self, model: PreTrainedModel, name: str | None = None, stack: str = "encoder"):
        self.model = model.eval().requires_grad_(False)
        self.partial_forward = PartialForward(model, stack)
        self.name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        self.revision = getattr(model.config, "_commit_hash", None)
        self.fingerprint = weights_fingerprint(model)

    @torch.inference_mode()
    def __call__(
        self, inputs: Mapping[str, Any], layers: Sequence[int] = (), **partial_forward: Any
    ) -> tuple[dict[int, Tensor], Tensor | None]:
        """Hidden states at `layers` and, if asked for, logits: see [`PartialForward`]. Inputs it lacks are dropped.

        Raises:
            RuntimeError: someone has put the model into training mode meanwhile.
        """
        if self.model.training:
            raise RuntimeError(
                f"The teacher {self.name} was put into training mode after the trainer had got it, so that dropout "
                "would change its answers; call its eval(), and if it was trained meanwhile make a new trainer."
            )
        return self.partial_forward(self.model, self._known(inputs), layers, **partial_forward)

    def at(self, step: int | None) -> FrozenTeacher:
        """The teacher of this optimizer step; None: the one that evaluations compare with."""
        return self

    def plan(self, max_steps: int) -> None:
        """Learn how long the student's training is; a frozen teacher needs no plan."""

    def _known(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        accepts = self.partial_forward.accepts
        known = {name: value for name, value in inputs.items() if accepts(name)}
        return known | {"use_cache": False} if accepts("use_cache") else known


class CheckpointTeacher(FrozenTeacher):
    """Checkpoints of a teacher's own training, one after another (Panigrahi et al., 2025).

    One model in memory, whose weights are exchanged. Evaluations compare with the last checkpoint.

    Args:
        folders: the checkpoints, in the order of their training.
        load: reads one of them as a checked model, in its place.
        schedule: see the config's `teacher_schedule`.

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
        self._steps = [_steps_of(folder) for folder in self._folders] if isinstance(schedule, str) else []
        if len(folders) > 1 or not isinstance(schedule, str):
            self._check_schedule()
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
        self.fingerprint = digest.hexdigest()
        self._index = len(self._folders) - 1
        self._ends: list[int] | None = None

    def at(self, step: int | None) -> FrozenTeacher:
        index = len(self._folders) - 1 if step is None else bisect_right(self._ends, step)
        if index != self._index:
            self.model.load_state_dict(self._load(self._folders[index]).state_dict())
            self._index = index
        return self

    def plan(self, max_steps: int) -> None:
        """Fix the student's step at which each checkpoint but the last stops teaching."""
        if self._schedule == "step":
            ends = self._steps[:-1]
        elif self._schedule == "fraction":
            ends = [round(step * max_steps / self._steps[-1]) for step in self._steps[:-1]]
        else:
            ends = [round(end * max_steps) if isinstance(end, float) else end for end in self._schedule]
            if sorted(set(ends)) != ends or any(not 0 < end < max_steps for end in ends):
                raise ValueError(
                    f"teacher_schedule is {self._schedule} (steps {ends} of {max_steps}); each checkpoint must stop "
                    "teaching after the one before it and before max_steps."
                )
        self._ends = ends if len(self._folders) > 1 else []

    def _check_schedule(self) -> None:
        if isinstance(self._schedule, str):
            if None in self._steps or sorted(set(self._steps)) != self._steps:
                raise ValueError(
                    f"teacher_schedule={self._schedule!r} needs folders named {PREFIX_CHECKPOINT_DIR}-STEP in "
                    f"increasing order, but the checkpoints are {', '.join(self._folders)}; set teacher_schedule to "
                    "the list of steps at which each but the last stops teaching."
                )
        elif len(self._schedule) != len(self._folders) - 1:
            raise ValueError(
                f"teacher_schedule has {len(self._schedule)} ends for {len(self._folders)} checkpoints; give one end "
                "for each but the last."
            )


def find_checkpoints(name: str) -> list[str]:
    """The `checkpoint-STEP` folders in a folder, by step; the name itself where it is one model.

    Raises:
        ValueError: the folder holds neither.
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


def weights_fingerprint(model: nn.Module, samples: int = 64) -> str:
    """SHA-256 over evenly spaced values of every parameter: training changes it, another device does not."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        spaced = flat[:: max(1, flat.numel() // samples)].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(spaced.numpy().tobytes())
    return digest.hexdigest()
