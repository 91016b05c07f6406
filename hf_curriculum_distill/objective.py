"""The loss of a stage on one batch: the student's outputs against a teacher's targets.

`train` and `plan` call the same [`Objective`]; nothing else computes a stage's loss.
"""

from __future__ import annotations

import functools
import math
import operator
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_curriculum_distill import losses
from hf_curriculum_distill.batches.batch import Batch
from hf_curriculum_distill.batches.positions import LABEL_POSITIONS
from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.hidden_losses import HIDDEN_LOSSES
from hf_curriculum_distill.layers.chunks import RowLogits, sum_over_chunks
from hf_curriculum_distill.layers.forward import PartialForward
from hf_curriculum_distill.layers.heads import EMBEDDING, Head, auxiliary_loss, balances_experts
from hf_curriculum_distill.stages import Stage
from hf_curriculum_distill.teachers.teacher import Targets


@dataclass
class StageLoss:
    """A stage's loss on a batch.

    Args:
        total: the weighted sum of the terms, a scalar with gradients.
        terms: by name, each a mean over the positions or rows that count in the whole accumulated batch.
        logits: the student's logits of the rows that count, `[rows, classes]`; None if they were computed in chunks or
            the stage needs none.
    """

    total: Tensor
    terms: dict[str, Tensor]
    logits: Tensor | None = None


class Objective:
    """Runs the student for a stage and compares its outputs with the targets.

    The student is called through its wrappers, so that autocast, DistributedDataParallel and torch.compile see its
    whole forward pass; gradients of a tensor that does not leave through a wrapper's forward would not be reduced over
    processes. Therefore a loss in chunks of logits must be computed inside: [`PartialForward`] calls `reduce` in the
    model's forward, which runs the head chunk by chunk and returns the sum over rows. Hidden states and whole logits
    are outputs of the wrapper, and their losses are computed after it.

    Args:
        student: runs the student.
        args: losses, weights, temperature, and what the student runs.
    """

    def __init__(self, student: PartialForward, args: CurriculumDistillationConfig):
        self.student, self._args = student, args
        self._balances_experts = balances_experts(student.model)

    def __call__(
        self,
        model: Callable[..., Any],
        batch: Batch,
        stage: Stage,
        targets: Targets,
        counts: Tensor,
        frozen: int | None = None,
    ) -> StageLoss:
        """The stage's loss on a batch.

        Args:
            model: the student, or its outermost wrapper.
            counts: the divisors of the sums, `[number of positions, number of rows]` that count in the whole
                accumulated batch.
            frozen: the highest layer of the student that gets no gradient (0: the embeddings); None for none.

        Raises:
            ValueError: the stage learns from labels and the batch has none, or hidden states do not fit the batch.
        """
        if stage.label_weight and batch.labels is None:
            raise ValueError(f"Stage {stage.name!r} learns from labels, but the batch has none; check the collator.")
        labels = batch.labels if stage.label_weight else None
        losses_of = functools.partial(logit_losses, stage, self._args, batch.head, targets.logits, labels)
        in_chunks = stage.needs_logits and batch.chunk_size is not None
        adds_balance = bool(stage.label_weight and self._balances_experts)

        def reduce(logits: Tensor | RowLogits, outputs: Any) -> Any:
            if adds_balance:
                return logits, auxiliary_loss(self.student.model, outputs)
            return sum_over_chunks(losses_of, logits)

        independent = self._args.train_prefix == "independent" and not stage.needs_logits
        hidden, logits = self.forward(
            model,
            batch,
            stage,
            frozen,
            reduce if in_chunks or adds_balance else None,
            targets.hidden if independent else None,
        )
        num_positions, num_rows = counts.clamp(min=1)
        terms, parts = {}, []
        if stage.hidden:
            loss_of, name = HIDDEN_LOSSES[self._args.hidden_loss], f"hidden_{self._args.hidden_loss}"
            errors = [
                loss_of(hidden[layer], targets.hidden[layer], batch.weights(targets.hidden[layer]))
                for layer in stage.student_layers
            ]
            num_matched = num_rows if self._args.hidden_positions == "labels" else num_positions
            error = errors[0] if len(errors) == 1 else torch.stack(errors).mean()
            terms[name] = error / num_matched
            parts.append(_weighted(terms[name], stage.hidden_weight))
        if adds_balance:
            logits, balance = logits
            terms["aux_loss"] = batch.num_rows * balance / num_rows  # weight a mean over tokens by the rows
            parts.append(_weighted(terms["aux_loss"], stage.label_weight))
        if stage.needs_logits:
            of_rows, sums = logits if in_chunks else losses_of(logits)
            terms |= {name: value.detach() / num_rows for name, value in sums.items()}
            parts.append(of_rows / num_rows)
        return StageLoss(functools.reduce(operator.add, parts), terms, None if in_chunks else logits)

    def forward(
        self,
        model: Callable[..., Any],
        batch: Batch,
        stage: Stage,
        frozen: int | None = None,
        reduce: Callable | None = None,
        substitutes: Mapping[int, Tensor] | None = None,
    ) -> tuple[dict[int, Tensor], Any]:
        """Run the student for the outputs that a stage matches.

        Args:
            model: the student, or its outermost wrapper.
            frozen: the highest layer of the student that gets no gradient (0: the embeddings); None for none.
            reduce, substitutes: see [`Wanted`].

        Returns:
            hidden states `{student_layer: [batch, length, hidden]}`; and the logits of the rows that count,
            `[rows, classes]`, or the result of `reduce`; None if the stage needs none.
        """
        rows = batch.rows if stage.needs_logits else None
        if self._args.torch_compile and rows is not None and LABEL_POSITIONS not in batch.inputs:
            torch._dynamo.maybe_mark_dynamic(rows, 0)  # one graph although the number of rows varies
        return self.student(
            model,
            batch.student_inputs,
            stage.student_layers,
            logits=stage.needs_logits,
            rows=rows,
            gather=rows is not None and batch.row_per_token,
            frozen=frozen,
            truncate=self._args.truncate,
            chunk_size=batch.chunk_size if stage.needs_logits else None,
            reduce=reduce,
            pool=batch.pool,
            substitutes=substitutes or {},
        )


def logit_losses(
    stage: Stage,
    args: CurriculumDistillationConfig,
    head: Head,
    target_logits: Tensor | RowLogits | losses.TopLogits | None,
    labels: Tensor | None,
    logits: Tensor,
    rows: slice = slice(None),
) -> tuple[Tensor, dict[str, Tensor]]:
    """A stage's weighted sum over rows of the student's logits, and its terms.

    Args:
        head: what a row is.
        target_logits: the teacher's logits of all rows, `[all rows, classes]`; None without a divergence.
        labels: `[all rows]`; None without a label term.
        logits: the student's, `[rows, classes]`, of all rows or of one chunk.
        rows: selects the matching rows of `target_logits` and `labels`.

    Returns:
        the weighted sum; and the terms by name, each a sum over rows without its weight.
    """
    terms, parts = {}, []
    targets = target_logits[rows] if stage.kl_weight else None
    labels = labels[rows] if stage.label_weight else None
    of_teacher, of_labels = logits, logits
    if stage.kl_weight and stage.label_weight and args.teacher_entropy_threshold is not None:
        highest = args.teacher_entropy_threshold * math.log(logits.shape[-1])
        certain = losses.entropy(targets, args.temperature) <= highest
        terms["certain"] = certain.sum()
        of_teacher, targets, of_labels, labels = logits[certain], targets[certain], logits[~certain], labels[~certain]
    if stage.kl_weight and head is EMBEDDING:
        name = f"output_{args.hidden_loss}"
        terms[name] = HIDDEN_LOSSES[args.hidden_loss](of_teacher[None], targets[None])
        parts.append(_weighted(terms[name], stage.kl_weight))
    elif stage.kl_weight and head.predicts_numbers:
        terms["output_mse"] = losses.squared_error(of_teacher, targets)
        parts.append(_weighted(terms["output_mse"], stage.kl_weight))
    elif stage.kl_weight:
        if isinstance(target_logits, losses.TopLogits):
            divergence = losses.TOP_DIVERGENCES[args.divergence]
        elif args.use_liger_kernel and _runs_triton(logits) and len(of_teacher):
            divergence = losses.fused_divergence(args.divergence)
        else:
            divergence = losses.DIVERGENCES[args.divergence]
        name = "hard_label_loss" if args.divergence == "hard" else "kl"  # a cross-entropy is no divergence
        terms[name] = divergence(losses.shared_classes(of_teacher, targets), targets, args.temperature)
        parts.append(_weighted(terms[name], stage.kl_weight))
    if stage.label_weight:
        terms["label_loss"] = head.label_loss(of_labels, labels, args.label_smoothing_factor, args.class_weights)
        parts.append(_weighted(terms["label_loss"], stage.label_weight))
    return functools.reduce(operator.add, parts), terms


def _weighted(term: Tensor, weight: float) -> Tensor:
    return term if weight == 1 else weight * term  # most weights are 1, and each product costs a small model's step


def _runs_triton(tensor: Tensor) -> bool:
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
