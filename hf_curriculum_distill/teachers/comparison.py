"""How a student compares with the labels and with its teacher, over a whole evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from hf_curriculum_distill.batches.batch import Batch
from hf_curriculum_distill.batches.checks import label_loss_mismatch
from hf_curriculum_distill.hidden_losses import hidden_state_mse
from hf_curriculum_distill.layers.forward import PartialForward
from hf_curriculum_distill.layers.heads import CLASSES, Head, is_ctc
from hf_curriculum_distill.logs import get_logger
from hf_curriculum_distill.losses import shared_classes
from hf_curriculum_distill.stages import LayerPair, Stage
from hf_curriculum_distill.teachers.teacher import Teacher, has_head

logger = get_logger(__name__)


class StudentComparison:
    """Adds up accuracy and, given a teacher, agreement and divergence over the batches of an evaluation.

    Args:
        teacher: whose logits the student's are compared with; None for accuracy alone.
        accelerator: gathers what the processes found.
        compares_logits: whether the teacher's logits mean what the student's do.

    Attributes:
        num_batches: that were added since the evaluation began.
        observe: is called with each batch whose logits are compared, its rows `[rows]`, and the student's and the
            teacher's logits of these; None for nobody.
    """

    def __init__(self, teacher: Teacher | None, accelerator: Accelerator, compares_logits: bool = True):
        self._teacher, self._accelerator, self.num_batches = teacher, accelerator, 0
        self._compares_logits = compares_logits and teacher is not None and has_head(teacher.model)
        self._metric, self._layers, self._cosines = TeacherComparison(), LayerComparison(), []
        self.observe: Callable[[Batch, Tensor, Tensor, Tensor], None] | None = None
        self._knows_rows: bool | None = None  # whether labels are those of the rows of the logits; None: not seen yet

    def start(self) -> None:
        """Begin an evaluation."""
        self.num_batches = 0
        self._metric, self._layers, self._cosines = TeacherComparison(), LayerComparison(), []

    def update(self, batch: Batch, outputs: Any, tolerance: float, has_loss: bool = True) -> None:
        """Add a batch.

        Args:
            batch: with whole logits.
            outputs: the student's.
            tolerance: the relative error that the precision of the computation allows.
            has_loss: whether the student was given the labels, so that its own loss is among its outputs.
        """
        self.num_batches += 1
        if not has_loss and not isinstance(outputs, Mapping):
            outputs = (None, *outputs)
        if self._knows_rows is None:
            mismatch = label_loss_mismatch(batch, outputs, tolerance)
            self._knows_rows = mismatch is None
            if mismatch:
                logger.warning("%s Evaluations have no accuracy, agreement and divergence.", mismatch)
        has_labels = all(name in batch.inputs for name in batch.head.label_names) or is_ctc(batch.model)
        if not self._knows_rows or not has_labels or not batch.head.is_in(outputs):
            return
        logits, teacher_logits = batch.head.logits(outputs, has_loss=True).flatten(0, -2), None
        rows = torch.arange(len(logits), device=logits.device) if batch.rows is None else batch.rows
        examples = rows // (len(logits) // len(batch))
        if self._compares_logits:
            self._teacher.advance(None)
            _, teacher_logits = self._teacher.forward(batch.with_rows(rows), Stage(kl_weight=1.0))
            if self.observe is not None:
                self.observe(batch, rows, logits[rows], teacher_logits)
        compared = self._accelerator, logits[rows], teacher_logits, batch.labels, examples, len(batch)
        self._metric.update(*compared, batch.head)

    def update_layers(
        self, batch: Batch, student: PartialForward, model: nn.Module, pairs: Sequence[LayerPair]
    ) -> None:
        """Add how far the student's layers are from their targets on a batch, which takes a pass of the student's.

        Args:
            student: finds the layers of `model`, which may be wrapped.
            pairs: the layers that are matched.
        """
        stage = Stage(hidden=pairs)
        hidden, _ = student(model, batch.student_inputs, stage.student_layers)
        self._teacher.advance(None)
        targets = self._teacher.targets(batch, stage).hidden
        self._layers.update(self._accelerator, hidden, targets, batch.weights(next(iter(hidden.values()))))

    def update_embeddings(self, batch: Batch, student: PartialForward, model: nn.Module) -> None:
        """Add the cosine similarity of the student's embedding to the teacher's, of each example.

        Args:
            student: runs `model`, which may be wrapped.
        """
        _, ours = student(model, batch.student_inputs, logits=True, pool=batch.pool)
        self._teacher.advance(None)
        theirs = self._teacher.targets(batch, Stage(kl_weight=1.0)).logits
        cosines = self._accelerator.gather_for_metrics(F.cosine_similarity(ours, theirs, dim=-1))
        self._cosines += cosines.cpu().double().tolist()

    def compute(self, prefix: str) -> dict[str, float]:
        """The metrics of the evaluation, by their names after `prefix`."""
        metrics = self._metric.compute() | self._layers.compute()
        if self._cosines:
            metrics["cosine"] = sum(self._cosines) / len(self._cosines)
        return {f"{prefix}_{name}": value for name, value in metrics.items()}


class TeacherComparison:
    """Adds up an evaluation's batches: the means over the counted rows of what [`compared_rows`] finds."""

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
        head: Head = CLASSES,
    ) -> None:
        """Add one batch.

        Args:
            accelerator: gathers the batch from all processes, without the examples that a distributed sampler repeats
                to fill the last batch.
            student_logits, teacher_logits, labels: see [`compared_rows`].
            examples: `[rows]`, the number of the example in the batch that each row belongs to.
            batch_size: the number of examples.
            head: what a row is.
        """
        columns = compared_rows(head, student_logits, teacher_logits, labels)
        self._names = list(columns)
        rows = torch.stack([torch.ones_like(examples).float(), *(column.float() for column in columns.values())], 1)
        per_example = rows.new_zeros(batch_size, rows.shape[1]).index_add_(0, examples, rows)
        sums = accelerator.gather_for_metrics(per_example).cpu().double().sum(0)
        self._sums = sums if self._sums is None else self._sums + sums

    def compute(self) -> dict[str, float]:
        """The means over all batches so far; empty before the first."""
        if self._sums is None:
            return {}
        rows, *sums = self._sums.tolist()
        return {name: total / max(1.0, rows) for name, total in zip(self._names, sums, strict=True)}


def compared_rows(
    head: Head, student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor | None
) -> dict[str, Tensor]:
    """How the student does on each row that counts, by name and each `[rows]`.

    `accuracy` says whether the student's likeliest class is the label, `agreement` whether it is the teacher's
    likeliest class, and `kl` is KL(teacher || student) at temperature 1, in nats. Of numbers there is `output_mse`, the
    squared difference to the teacher's.

    Args:
        head: what a row is.
        student_logits: `[rows, classes]`, of the rows that count.
        teacher_logits: the same of the teacher; None where there is no teacher.
        labels: `[rows]`, class numbers; None where rows have none.
    """
    if head.predicts_numbers:
        if teacher_logits is None:
            return {}
        return {"output_mse": (student_logits.float() - teacher_logits.float()).square().mean(-1)}
    choices, columns = student_logits.argmax(-1), {}
    if labels is not None:
        columns["accuracy"] = choices == labels
    if teacher_logits is not None:
        teacher = F.log_softmax(teacher_logits.float(), -1)
        student = F.log_softmax(shared_classes(student_logits, teacher_logits).float(), -1)
        kl = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
        columns |= {"agreement": choices == teacher_logits.argmax(-1), "kl": kl}
    return columns


class LayerComparison:
    """Adds up the squared error of each layer's hidden states over an evaluation's batches.

    `layer_3_mse` is that of layer 3: the mean over positions and coordinates, 1 where the targets are standardised and
    the student always predicts their mean.
    """

    def __init__(self):
        self._sums: Tensor | None = None

    def update(
        self, accelerator: Accelerator, hidden: Mapping[int, Tensor], targets: Mapping[int, Tensor], weights: Tensor
    ) -> None:
        """Add one batch.

        Args:
            accelerator: see [`TeacherComparison.update`].
            hidden, targets: `{layer: [batch, length, hidden]}`.
            weights: of each position, `[batch, length]`.
        """
        self._names = [f"layer_{layer}_mse" for layer in targets]
        errors = [
            torch.stack([hidden_state_mse(*example) for example in zip(hidden[layer], target, weights, strict=True)])
            for layer, target in targets.items()
        ]
        per_example = torch.stack([weights.sum(1).float(), *errors], 1)
        sums = accelerator.gather_for_metrics(per_example).cpu().double().sum(0)
        self._sums = sums if self._sums is None else self._sums + sums

    def compute(self) -> dict[str, float]:
        """The mean of each layer over all batches so far; empty before the first."""
        if self._sums is None:
            return {}
        weight, *sums = self._sums.tolist()
        return {name: total / max(1.0, weight) for name, total in zip(self._names, sums, strict=True)}
