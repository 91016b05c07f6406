"""One micro-batch: each fact about it is computed once, when it is first needed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from hf_curriculum_distill.batches.positions import (
    LABEL_POSITIONS,
    count,
    counted_rows,
    has_rows_per_token,
    label_weights,
    num_masked_patches,
    num_rows_per_example,
    position_weights,
    shifted_right,
)
from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.layers.chunks import chunk_size
from hf_curriculum_distill.layers.forward import PartialForward
from hf_curriculum_distill.layers.heads import (
    EMBEDDING,
    Head,
    balances_experts,
    decodes_labels,
    head_of,
    num_classes,
)
from hf_curriculum_distill.layers.pooling import pooled


class BatchReader:
    """Reads what a collator made as a [`Batch`], for the models of a run.

    Args:
        student, teacher: the models of the run; the student's class says which rows of logits count.
        args: which positions count, and how many rows of logits a chunk has.
        label_names: the names of the inputs that are labels.
        reads_labels: whether a loss needs labels; otherwise they may be anything.
        whole_logits: whether logits are never cut into chunks.
    """

    def __init__(
        self,
        student: PartialForward,
        teacher: PartialForward | None,
        args: CurriculumDistillationConfig,
        label_names: Collection[str] = ("labels",),
        reads_labels: bool = True,
        whole_logits: bool = False,
    ):
        self.student, self.teacher, self.args = student, teacher, args
        self.head, self.reads_labels = EMBEDDING if args.pooling else head_of(student.model), reads_labels
        self.label_names = {*label_names, LABEL_POSITIONS}
        self.whole_logits = whole_logits or balances_experts(student.model)
        self.num_patches = num_masked_patches(student.model)

    def __call__(self, inputs: Mapping[str, Any], whole_logits: bool = False) -> Batch:
        return Batch(inputs, self, whole_logits or self.whole_logits)


class Batch:
    """The inputs of one micro-batch and what follows from them. Made by a [`BatchReader`].

    The first access to `rows` or `labels` waits for the device, unless the collator gave the labels' positions.

    Attributes:
        inputs: what the collator made.
        model_inputs: the inputs without labels, so that no model computes its own loss.
        rows: numbers `[rows]` of the rows that count in the flattened logits; None if all do.
        labels: the labels of these rows, `[rows]`; None if the batch has none.
        counts: `[number of positions, number of rows]` that count, computed without waiting for the device.
        row_per_token: whether logits have one row for each token or frame, not one for each example.
        rows_per_example: the number of rows of logits of an example, padding included.
        chunk_size: the number of rows of logits in a chunk; None for all at once.
    """

    def __init__(self, inputs: Mapping[str, Any], reader: BatchReader, whole_logits: bool = False):
        self.inputs, self._reader, self._whole_logits = inputs, reader, whole_logits
        self._weights: dict[tuple[int, ...], Tensor] = {}

    @property
    def model(self) -> nn.Module:
        """The student, whose class says which rows of logits count."""
        return self._reader.student.model

    @property
    def head(self) -> Head:
        """What the rows of logits are."""
        return self._reader.head

    @property
    def main_input(self) -> Tensor:
        """The model's main input, such as `input_ids` `[batch, length]` or `pixel_values`."""
        return self.inputs[self.model.main_input_name]

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.main_input)

    @cached_property
    def model_inputs(self) -> dict[str, Any]:
        inputs = {name: value for name, value in self.inputs.items() if name not in self._reader.label_names}
        given = {"decoder_input_ids", "decoder_inputs_embeds"} & inputs.keys()
        if decodes_labels(self.model) and not given and "labels" in self.inputs:
            inputs["decoder_input_ids"] = shifted_right(self.model, self.inputs["labels"])
        if self.noise is not None:
            inputs["noise"] = self.noise
        return inputs

    @cached_property
    def noise(self) -> Tensor | None:
        """By which masked autoencoders choose the patches that they read, `[batch, patches]`: the same of both models.

        It is drawn when it is first needed, unless the batch has it; None for other models.
        """
        if not self._reader.num_patches or self.inputs.get("noise") is not None:
            return None
        return torch.rand(len(self), self._reader.num_patches, device=self.main_input.device)

    @cached_property
    def student_inputs(self) -> dict[str, Any]:
        """The model inputs without those that only the teacher's forward accepts."""
        return self.for_student(self.model_inputs)

    def for_student(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs without those that only the teacher's forward accepts; all others are passed on, as in Trainer."""
        student, teacher = self._reader.student, self._reader.teacher or self._reader.student
        return {name: value for name, value in inputs.items() if student.accepts(name) or not teacher.accepts(name)}

    @cached_property
    def _counted(self) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if self.head is EMBEDDING else counted_rows(self.model, self.inputs)

    @property
    def rows(self) -> Tensor | None:
        return self._counted[0]

    @property
    def labels(self) -> Tensor | None:
        return self._counted[1]

    @property
    def num_rows(self) -> int:
        """The number of rows that count; 0 if all do."""
        return 0 if self.rows is None else len(self.rows)

    def with_rows(self, rows: Tensor, labels: Tensor | None = None) -> Batch:
        """The same inputs, with other rows of logits that count.

        Args:
            rows: their numbers in the flattened logits, `[rows]`.
            labels: their labels, `[rows]`.
        """
        batch = Batch(self.inputs, self._reader, self._whole_logits)
        batch._counted, batch.model_inputs = (rows, labels), self.model_inputs
        return batch

    @cached_property
    def counts(self) -> Tensor:
        inputs = self.inputs
        if not self._reader.reads_labels:
            inputs = {name: value for name, value in inputs.items() if name not in self.head.label_names}
        counts = count(self.model, inputs, self._reader.args.layer_stack)
        return torch.stack([counts[0], torch.full_like(counts[0], len(self))]) if self.head is EMBEDDING else counts

    @cached_property
    def row_per_token(self) -> bool:
        return self.head is not EMBEDDING and has_rows_per_token(self.model, self.inputs)

    @cached_property
    def rows_per_example(self) -> int:
        return 1 if self.head is EMBEDDING else num_rows_per_example(self.model, self.inputs)

    @property
    def pool(self) -> Callable[[Any], Tensor] | None:
        """Makes one vector of each example, `[batch, hidden]`, of a model's outputs; None for models with a head."""
        return self._pooled if self.head is EMBEDDING else None

    def _pooled(self, outputs: Any) -> Tensor:
        kind = self._reader.args.pooling
        name = "pooler_output" if kind == "pooler" else "last_hidden_state"
        if not isinstance(outputs, Mapping) or outputs.get(name) is None:
            raise ValueError(
                f"pooling={kind!r} needs the {name} of both models, but one returns only "
                f"{', '.join(outputs) if isinstance(outputs, Mapping) else f'a {type(outputs).__name__}'}; load them "
                "without a head, as AutoModel does, or use another pooling."
            )
        states = outputs[name]
        return states.float() if kind == "pooler" else pooled(kind, states, self.weights(states))

    @cached_property
    def chunk_size(self) -> int | None:
        if self._whole_logits or self.rows is None:
            return None
        return chunk_size(self._reader.args, len(self.rows), num_classes(self.model) or 0)

    def weights(self, hidden: Tensor) -> Tensor:
        """The weight of each hidden state, `[batch, length]`: at tokens, or where labels count.

        Args:
            hidden: `[batch, length, hidden]`, of which only the shape is read.

        Raises:
            ValueError: the mask or the labels do not fit the hidden states.
        """
        if (shape := hidden.shape[:2]) not in self._weights:
            args = self._reader.args
            with torch.inference_mode(False):  # the teacher may ask first, and the student's loss keeps them
                if args.hidden_positions == "labels":
                    self._weights[shape] = label_weights(self.model, self.inputs, hidden)
                else:
                    self._weights[shape] = position_weights(self.model, self.inputs, hidden, args.layer_stack)
        return self._weights[shape]
