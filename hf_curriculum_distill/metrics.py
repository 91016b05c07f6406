"""Metrics that need no download: an `evaluate` module defined here, and the comparison with a teacher."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor


class CountedAccuracy(evaluate.Metric):
    """Share of predictions equal to their reference, over references that are not -100.

    ```python
    >>> CountedAccuracy().compute(predictions=[1, 2, 3], references=[1, 0, -100])
    {'accuracy': 0.5}

    ```
    """

    def __init__(self, **kwargs):
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy over references that are not -100.",
            citation="",
            inputs_description="predictions and references: class numbers, flat; -100 is not counted.",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        predictions, references = np.asarray(predictions), np.asarray(references)
        counted = references != -100
        if not counted.any():
            raise ValueError("No reference counts: all are -100. Check the labels.")
        return {"accuracy": float((predictions == references)[counted].mean())}


class TeacherComparison:
    """Adds up, over an evaluation, how the student's answers compare with the labels and the teacher's.

    `accuracy`: share of counted rows where the student's first choice is the label. `agreement`: where it is the
    teacher's first choice. `kl`: mean KL(teacher || student) at temperature 1.
    """

    def __init__(self):
        self._sums: Tensor | None = None

    def update(
        self,
        accelerator: Accelerator,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor | None,
        examples: Tensor,
        batch_size: int,
    ) -> None:
        """Add one batch.

        Args:
            student_logits, teacher_logits: `[rows, classes]`, the counted rows.
            labels: `[rows]`; None where rows have none.
            examples: `[rows]`, the example of the batch that each row belongs to, so that what a distributed sampler
                repeats to fill the last batch can be left out.
            batch_size: the number of examples.
        """
        choices = student_logits.argmax(-1)
        columns = {"rows": torch.ones_like(choices)}
        if labels is not None:
            columns["accuracy"] = choices == labels
        if teacher_logits is not None:
            teacher = F.log_softmax(teacher_logits.float(), -1)
            student = F.log_softmax(student_logits.float(), -1)
            kl = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
            columns |= {"agreement": choices == teacher_logits.argmax(-1), "kl": kl}
        self._names = list(columns)
        rows = torch.stack([column.float() for column in columns.values()], 1)
        per_example = rows.new_zeros(batch_size, rows.shape[1]).index_add_(0, examples, rows)
        sums = accelerator.gather_for_metrics(per_example).cpu().double().sum(0)
        self._sums = sums if self._sums is None else self._sums + sums

    def compute(self) -> dict[str, float]:
        if self._sums is None:
            return {}
        rows, *sums = self._sums.tolist()
        return {name: total / max(1.0, rows) for name, total in zip(self._names[1:], sums, strict=True)}
