"""Teachers: a frozen model, or its checkpoints one after another."""

from __future__ import annotations

import hashlib
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_curriculum_distill.adapted import stored_tensors
from hf_curriculum_distill.batch import Batch
from hf_curriculum_distill.chunks import RowLogits
from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.layers import PartialForward
from hf_curriculum_distill.losses import TopLogits
from hf_curriculum_distill.projections import ProjectionBank
from hf_curriculum_distill.stages import Stage


@dataclass
class Targets:
    """A teacher's outputs that a stage matches on a batch.

    Args:
        hidden: projected hidden states `{student_layer: [batch, length, student_dim]}`, float32.
        logits: `[rows, classes]` of the rows that count: a tensor, computed in chunks, or only the likeliest classes;
            None if the stage needs none.
        computed: whether the teacher ran for them.
    """

    hidden: dict[int, Tensor] = field(default_factory=dict)
    logits: Tensor | RowLogits | TopLogits | None = None
    computed: bool = True


class Teacher:
    """A trained model that computes targets: in eval mode, without gradients, and never part of the student.

    Teachers whose weights change override the methods that do nothing here.

    Args:
        model: the teacher. It is put into eval mode and its parameters stop requiring gradients.
        name: the name or folder that it was loaded from, for `curriculum.json` and messages.
        stack: the stack of an encoder-decoder whose blocks are matched.

    Attributes:
        learns: whether it trains alongside the student.
    """

    learns = False

    def __init__(self, model: PreTrainedModel, name: str | None = None, stack: str = "encoder"):
        self.model = model.eval().requires_grad_(False)
        self.partial_forward = PartialForward(model, stack)
        self.name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        self.revision = getattr(model.config, "_commit_hash", None)
        self.prepare(None)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all the weights that it teaches with: see [`weights_fingerprint`]."""
        return weights_fingerprint(self.model)

    @cached_property
    def identity(self) -> dict[str, str | None]:
        """How a projection bank describes the model that it was measured on.

        `fingerprint` is None if the weights change while it teaches. `name` and `revision` are those on the Hub, else
        None: a bank may be published, so it never has the name of a local folder.
        """
        origin = getattr(self.model.config, "_name_or_path", "")
        on_hub = self.revision is not None and not os.path.exists(origin)
        named = {"name": origin, "revision": self.revision} if on_hub else {"name": None, "revision": None}
        return {"fingerprint": None if self.learns else self.fingerprint} | named

    def prepare(
        self,
        projection_bank: ProjectionBank | None,
        truncate: bool = True,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        """Set what [`targets`] needs besides the batch.

        Args:
            projection_bank: projects the hidden states; None if no stage matches any.
            truncate: whether to run only the blocks that a stage needs.
            autocast: returns the context in which the model runs.
        """
        self._bank, self._truncate, self._autocast = projection_bank, truncate, autocast

    def targets(self, batch: Batch, stage: Stage) -> Targets:
        """The projected hidden states and the logits that a stage matches."""
        hidden, logits = self.forward(batch, stage)
        return Targets({s: self._bank.project(s, hidden[t]) for s, t in stage.hidden}, logits)

    def forward(self, batch: Batch, stage: Stage) -> tuple[dict[int, Tensor], Tensor | RowLogits | None]:
        """The model's outputs that a stage matches.

        Returns:
            hidden states, not projected, `{teacher_layer: [batch, length, teacher_dim]}`; and the logits of the rows
            that count, `[rows, classes]`, None if the stage has no divergence.
        """
        rows = batch.rows if stage.needs_logits else None
        with self._autocast():
            return self(
                batch.model_inputs,
                stage.teacher_layers,
                logits=bool(stage.kl_weight),
                rows=rows,
                gather=rows is not None and batch.row_per_token,
                truncate=self._truncate,
                chunk_size=batch.chunk_size if stage.kl_weight else None,
            )

    def fit(self, bank: ProjectionBank, batches: Iterable[Batch]) -> None:
        """Measure a bank on the hidden states of some batches, and freeze it: see [`ProjectionBank.fit`].

        Args:
            bank: not yet frozen.
            batches: batches of the training data, on the teacher's device.
        """

        def states(batch: Batch, layers: Sequence[int]) -> tuple[dict[int, Tensor], Tensor]:
            with self._autocast():
                hidden, _ = self(batch.model_inputs, layers)
            return hidden, batch.weights(hidden[layers[0]])

        bank.fit(states, batches, self.identity)

    @torch.inference_mode()
    def __call__(
        self, inputs: Mapping[str, Any], layers: Sequence[int] = (), **wanted: Any
    ) -> tuple[dict[int, Tensor], Tensor | RowLogits | None]:
        """Hidden states at `layers` and whatever else is `wanted`: see [`PartialForward`].

        Args:
            inputs: those that the model's forward lacks are dropped.

        Raises:
            RuntimeError: the model was put into training mode since construction.
        """
        if self.model.training:
            raise RuntimeError(
                f"The teacher {self.name} was put into training mode after the trainer had got it, so that dropout "
                "would change its outputs; call its eval(), and if it was trained meanwhile make a new trainer."
            )
        return self.partial_forward(self.model, self.known(inputs), layers, **wanted)

    def wanted(self, stage: Stage) -> Stage:
        """What the teacher computes when a stage needs targets, as a stage."""
        return stage

    def known(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs that the model's forward accepts, with its cache of keys and values turned off."""
        accepts = self.partial_forward.accepts
        inputs = {name: value for name, value in inputs.items() if accepts(name)}
        return inputs | {"use_cache": False} if accepts("use_cache") else inputs

    def plan(self, max_steps: int) -> None:
        """Set the length of the student's training in optimizer steps."""

    def start(self, args: CurriculumDistillationConfig, max_steps: int, decayed: Collection[str]) -> None:
        """Begin a training of the student.

        Args:
            max_steps: its number of optimizer steps.
            decayed: names of the teacher's parameters with weight decay.
        """

    def advance(self, step: int | None) -> None:
        """Load the weights that teach at this optimizer step; None: those that evaluations compare with."""

    def learn(self, batch: Batch, num_rows: Tensor, accelerator: Accelerator) -> dict[str, Tensor]:
        """Train on a micro-batch, after its targets were computed.

        Args:
            num_rows: the number of rows that count in the whole accumulated batch.

        Returns:
            what to log: scalars by name.
        """
        return {}

    def save(self, checkpoint: str) -> list[str]:
        """Write what the next step needs beside a student's checkpoint; returns the folders that were written."""
        return []

    def load(self, checkpoint: str, step: int) -> None:
        """Continue after `step` optimizer steps from what [`save`] wrote. Call [`start`] first."""

    def remove_old_files(self, output_dir: str) -> None:
        """Remove what [`save`] wrote for checkpoints that were removed."""


FrozenTeacher = Teacher  # its name before 0.2


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


def weights_fingerprint(model: nn.Module, samples: int = 64, leave_out: Collection[str] = ()) -> str:
    """SHA-256 over evenly spaced values of every parameter: training changes it, moving to another device does not.

    Args:
        samples: about how many values of each parameter are hashed.
        leave_out: names of parameters that are not hashed.
    """
    digest = hashlib.sha256()
    stored = ((name, tensor) for name, tensor in stored_tensors(model) if name not in leave_out)
    for name, tensor in sorted(stored, key=lambda named: named[0]):
        flat = tensor.flatten()
        spaced = flat[:: max(1, flat.numel() // samples)].float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(spaced.numpy().tobytes())
    return digest.hexdigest()
