"""How a student compares with the labels and with its teacher, over a whole evaluation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor


class TeacherComparison:
    """Adds up an evaluation's batches.

    Over the counted rows of logits, `accuracy` is the share where the student's likeliest class is the label,
    `agreement` the share where it is the teacher's likeliest class, and `kl` the mean KL(teacher || student) at
    temperature 1, in nats.
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
            accelerator: gathers the batch from all processes, without the examples that a distributed sampler repeats
                to fill the last batch.
            student_logits: `[rows, classes]`, of the rows that count.
            teacher_logits: the same of the teacher; None where there is no teacher.
            labels: `[rows]`, class numbers; None where rows have none.
            examples: `[rows]`, the number of the example in the batch that each row belongs to.
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
        """The means over all batches so far; empty before the first."""
        if self._sums is None:
            return {}
        rows, *sums = self._sums.tolist()
        return {name: total / max(1.0, rows) for name, total in zip(self._names[1:], sums, strict=True)}
