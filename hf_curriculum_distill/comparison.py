"""Comparison of the student with its teacher, over an evaluation."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator

from hf_curriculum_distill.batch import Batch
from hf_curriculum_distill.checks import label_loss_mismatch
from hf_curriculum_distill.counting import answers_per_frame
from hf_curriculum_distill.metrics import TeacherComparison
from hf_curriculum_distill.stages import Stage
from hf_curriculum_distill.teachers import Teacher

logger = logging.getLogger(__name__)


class StudentComparison:
    """Adds up accuracy and, given a teacher, agreement and divergence over the batches of an evaluation.

    Args:
        teacher: whose logits the student's are compared with; None for accuracy alone.
        accelerator: gathers what the processes found.
    """

    def __init__(self, teacher: Teacher | None, accelerator: Accelerator):
        self._teacher, self._accelerator = teacher, accelerator
        self._metric = TeacherComparison()
        self._knows_rows: bool | None = None  # whether labels are those of the rows of the logits; None: not seen yet

    def start(self) -> None:
        """Begin an evaluation."""
        self._metric = TeacherComparison()

    def update(self, batch: Batch, outputs: Any, tolerance: float) -> None:
        """Add a batch.

        Args:
            batch: with whole logits.
            outputs: the student's, with its own loss.
            tolerance: the relative error that the precision of the computation allows.
        """
        if self._knows_rows is None:
            mismatch = label_loss_mismatch(batch, outputs, tolerance)
            self._knows_rows = mismatch is None
            if mismatch:
                logger.warning("%s Evaluations have no accuracy, agreement and divergence.", mismatch)
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else outputs[1]
        if logits is None or not self._knows_rows or not ("labels" in batch.inputs or answers_per_frame(batch.model)):
            return
        logits, teacher_logits = logits.flatten(0, -2), None
        rows = torch.arange(len(logits), device=logits.device) if batch.rows is None else batch.rows
        examples = rows // (len(logits) // len(batch))
        if self._teacher is not None:
            self._teacher.advance(None)
            _, teacher_logits = self._teacher.forward(batch.with_rows(rows), Stage(kl_weight=1.0))
        self._metric.update(self._accelerator, logits[rows], teacher_logits, batch.labels, examples, len(batch))

    def compute(self, prefix: str) -> dict[str, float]:
        """The metrics of the evaluation, by their names after `prefix`."""
        return {f"{prefix}_{name}": value for name, value in self._metric.compute().items()}
