"""Teachers: a frozen model, or its checkpoints one after another."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from hf_curriculum_distill.batches.batch import Batch
from hf_curriculum_distill.batches.checks import naming_batch
from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.layers.blocks import describe_model
from hf_curriculum_distill.layers.chunks import RowLogits
from hf_curriculum_distill.layers.forward import PartialForward
from hf_curriculum_distill.layers.heads import EMBEDDING
from hf_curriculum_distill.layers.weights import weights_fingerprint
from hf_curriculum_distill.losses import TopLogits
from hf_curriculum_distill.projections import ProjectionBank
from hf_curriculum_distill.stages import Stage


@dataclass
class Targets:
    """A teacher's outputs that a stage matches on a batch.

    Args:
        hidden: projected hidden states `{student_layer: [batch, length, student_dim]}`, float32.
        logits: `[rows, classes]` of the rows that count: a tensor, computed in chunks, or only the likeliest classes;
            or the examples' embeddings, in the student's width; None if the stage needs none.
        computed: whether the teacher ran for them.
    """

    hidden: dict[int, Tensor] = field(default_factory=dict)
    logits: Tensor | RowLogits | TopLogits | None = None
    computed: bool = True


def has_head(model: PreTrainedModel) -> bool:
    """Whether a model computes more than hidden states."""
    return type(model).__name__ not in MODEL_MAPPING_NAMES.values()


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

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}: {describe_model(self.model, self.partial_forward.stack)})"

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
        named = {"name": origin, "revision": self.revision} if self._is_on_hub else {"name": None, "revision": None}
        return {"fingerprint": None if self.learns else self.fingerprint} | named

    @property
    def _is_on_hub(self) -> bool:
        # an adapter in a folder has the configuration, and so the revision, of its base
        places = [getattr(self.model.config, "_name_or_path", ""), *self.name.split(", ")]
        return self.revision is not None and not any(map(os.path.exists, places))

    @property
    def origin(self) -> dict[str, str | None]:
        """What `curriculum.json` says of the teacher.

        The file may be published, so of a local folder, which has no revision, the name is its last part alone.
        """
        names = self.name if self._is_on_hub else ", ".join(map(_last_part, self.name.split(", ")))
        revision = self.revision if self._is_on_hub else None
        return {"name": names, "revision": revision, "fingerprint": self.fingerprint}

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
        if batch.head is EMBEDDING and logits is not None and self._bank is not None:
            logits = self._bank.project_output(logits)
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
                pool=batch.pool,
                chunk_size=batch.chunk_size if stage.kl_weight else None,
            )

    def fit(self, bank: ProjectionBank, batches: Iterable[Batch], standardize: bool = True) -> None:
        """Measure a bank on the hidden states of some batches, and freeze it: see [`ProjectionBank.fit`].

        Args:
            bank: not yet frozen.
            batches: batches of the training data, on the teacher's device.
            standardize: whether targets are standardised.
        """

        def states(batch: Batch, layers: Sequence[int]) -> tuple[dict[int, Tensor], Tensor]:
            with naming_batch("the calibration sample"), self._autocast():
                hidden, _ = self(batch.model_inputs, layers)
            return hidden, batch.weights(hidden[layers[0]])

        bank.fit(states, batches, self.identity, standardize)

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

    def learn(self, batch: Batch, counts: Tensor, accelerator: Accelerator) -> dict[str, Tensor]:
        """Train on a micro-batch, after its targets were computed.

        Args:
            counts: `[number of positions, number of rows]` that count in the whole accumulated batch.

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


def _last_part(path: str) -> str:
    return os.path.basename(os.path.abspath(path))


FrozenTeacher = Teacher  # its name before 0.2
