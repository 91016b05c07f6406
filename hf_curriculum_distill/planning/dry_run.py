"""Run a run's models on fake tensors, to know operations, trained parameters and memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from types import MethodType

import torch
import torch.nn.functional as F
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel, masking_utils

from hf_curriculum_distill.batches.batch import BatchReader
from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.cost import stage_flops
from hf_curriculum_distill.layers.chunks import cut_rows
from hf_curriculum_distill.layers.forward import PartialForward
from hf_curriculum_distill.layers.heads import num_classes
from hf_curriculum_distill.objective import Objective
from hf_curriculum_distill.planning.memory import PeakMemory
from hf_curriculum_distill.preparing.calibration import projected_pairs
from hf_curriculum_distill.projections import ProjectionBank
from hf_curriculum_distill.stages import Stage
from hf_curriculum_distill.teachers.teacher import Targets, Teacher


@contextmanager
def _unpacked() -> Iterator[None]:
    """Without values, position ids look to transformers like packed sequences, which would need a mask."""
    find = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention as on an accelerator: one kernel, which applies dropout itself and stores no probabilities."""
    attend = F.scaled_dot_product_attention

    def attend_fused(*args, **kwargs):
        if torch.is_autocast_enabled("cpu"):
            args = [t.to(torch.get_autocast_dtype("cpu")) if isinstance(t, Tensor) else t for t in args]
        with torch.autocast("cpu", enabled=False):
            return attend(*args, **kwargs | {"dropout_p": 0.0})

    F.scaled_dot_product_attention = attend_fused  # no torch mode: checkpointed blocks recompute outside
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attend


class DryRun:
    """Student and teacher as fake tensors, and the cost of a micro-batch of each stage.

    Args:
        mode: the mode under which the models were made.
        student, teacher: the models; None for a teacher that the plan does not have.
        ids_shape: `[batch, length]`, or `[batch, choices, length]`.
        labels_shape: `[batch, length]`, or `[batch]` for one label per example.
        num_rows: the number of rows of logits that count.
    """

    def __init__(
        self,
        mode: FakeTensorMode,
        student: PartialForward,
        teacher: Teacher | None,
        args: CurriculumDistillationConfig,
        ids_shape: tuple[int, ...],
        labels_shape: tuple[int, ...],
        num_rows: int,
    ):
        self.mode, self.student, self.teacher, self.args = mode, student, teacher, args
        self.ids_shape, self.num_rows = ids_shape, num_rows
        self._objective = Objective(student, args)
        self._frozen_teacher = copy.copy(teacher)
        if teacher is not None:
            self._frozen_teacher.learns = False
        self._measured: dict[tuple, tuple[int, int, set[str], PeakMemory]] = {}
        student.model.config.use_cache = args.use_cache  # as Trainer sets it
        if args.bf16 or args.fp16:
            _wrap_for_mixed_precision(student.model, self._autocast())
        read = BatchReader(
            student, teacher and teacher.partial_forward, args, whole_logits=bool(args.deepspeed or args.fsdp)
        )
        with mode:
            shapes = {"input_ids": ids_shape, "labels": labels_shape}
            numbers = None if args.pooling else torch.zeros(num_rows, dtype=torch.long)
            inputs = {name: torch.zeros(shape, dtype=torch.long) for name, shape in shapes.items()}
            self._batch = read(inputs).with_rows(numbers, numbers)
            self._counts = torch.ones(2, dtype=torch.long)

    def measure(
        self, stage: Stage, frozen: int | None = None, online: bool = False
    ) -> tuple[int, int, set[str], PeakMemory]:
        """Measure a micro-batch of a stage.

        Args:
            frozen: the highest layer of the student that gets no gradient (0: the embeddings); None for none.
            online: whether the teacher also trains, on the labels.

        Returns:
            the operations of the student and of the teacher; the names of the student's parameters that get a gradient;
            and the peak of memory, that of logits as `peak_of_size`.
        """
        key = replace(stage, until=None), frozen, online
        if key not in self._measured:
            teacher = self.teacher if online else self._frozen_teacher
            with self.mode:
                if teacher is not None:
                    teacher.prepare(self._make_bank(stage), self.args.truncate, self._autocast)
                flops = stage_flops(self._objective, teacher, self._batch, stage, frozen)
            self._measured[key] = *(int(n.sum()) for n in flops), *self._try_step(teacher, stage, frozen)
        return self._measured[key]

    def _make_bank(self, stage: Stage) -> ProjectionBank | None:
        models = self.student, self.teacher.partial_forward
        pairs = projected_pairs([stage], self.args, *models)
        return ProjectionBank.create(pairs, *([m.hidden_size] * len(pairs) for m in models)).freeze() if pairs else None

    def _try_step(self, teacher: Teacher | None, stage: Stage, frozen: int | None) -> tuple[set[str], PeakMemory]:
        student, models = self.student.model, [self.student.model, *([teacher.model] if teacher else [])]
        chunks = cut_rows(self.num_rows, self._batch.chunk_size or max(1, self.num_rows))
        classes = num_classes(student) or self.ids_shape[1]  # of a span, the tokens; otherwise the choices
        sizes = {(chunk.stop - chunk.start) * classes for chunk in chunks if self._batch.pool is None}
        with self.mode, _unpacked(), nullcontext() if self.args.use_cpu else _fused_attention():
            parameters = [parameter for model in models for parameter in model.parameters() if parameter.requires_grad]
            with PeakMemory(parameters, sizes) as memory:
                self._loss(teacher, stage, frozen).backward()
            trained = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
            for parameter in parameters:
                parameter.grad = None
        return trained, memory

    def _loss(self, teacher: Teacher | None, stage: Stage, frozen: int | None) -> Tensor:
        """What the trainer does with a micro-batch before its backward pass."""
        targets = teacher.targets(self._batch, stage) if stage.needs_teacher else Targets()
        loss = self._objective(self.student.model, self._batch, stage, targets, self._counts, frozen)
        if teacher is not None and teacher.learns:
            teacher.task_loss(self._batch, self._counts[1]).backward()
            teacher.model.eval()
            if self.args.gradient_accumulation_steps == 1:  # its step comes before the student's backward
                teacher.model.zero_grad()
        return loss.total

    def _autocast(self) -> AbstractContextManager:
        if not (self.args.bf16 or self.args.fp16):
            return nullcontext()
        return torch.autocast("cpu", torch.bfloat16 if self.args.bf16 else torch.float16)


def _wrap_for_mixed_precision(model: PreTrainedModel, autocast: torch.autocast) -> None:
    """Wrap the forward as accelerate does in mixed precision."""
    forward = convert_outputs_to_fp32(autocast(model.forward.__func__))
    model.forward = MethodType(forward, model)
