"""Check on two examples, before the first step, that a training will have everything that its stages need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_curriculum_distill.batches.batch import Batch, BatchReader
from hf_curriculum_distill.batches.checks import label_loss_mismatch
from hf_curriculum_distill.batches.positions import LABEL_POSITIONS
from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.hidden_losses import HIDDEN_LOSSES
from hf_curriculum_distill.layers.adapted import is_quantised
from hf_curriculum_distill.layers.heads import has_known_head
from hf_curriculum_distill.objective import Objective
from hf_curriculum_distill.stages import Stage, matched_pairs
from hf_curriculum_distill.teachers.teacher import Targets, Teacher


@torch.no_grad()
def try_out(
    objective: Objective, teacher: Teacher | None, read: BatchReader, batch: Batch, stages: Sequence[Stage]
) -> None:
    """Run both models on two examples of a batch, for every output that any stage needs.

    Args:
        objective: runs the student.
        teacher: computes targets; None if no stage needs any.
        read: makes a [`Batch`] of these examples.
        batch: the batch that they are taken from.

    Raises:
        ValueError: an output is missing or has a wrong shape, the head computes other logits for some rows than for all
            of them, or the model's own loss shows that labels are not the classes of the rows that this library
            compares.
    """
    student, args = objective.student.model, read.args
    weights = {f"{n}_weight": float(any(getattr(s, f"{n}_weight") for s in stages)) for n in ("kl", "label")}
    every = Stage(matched_pairs(stages), **weights)
    batch = read(_few_examples(batch, every.needs_logits), whole_logits=True)
    # on some CPUs bitsandbytes repacks weights in eval mode, after which they give no gradient
    packed = is_quantised(student)
    student.train(packed)
    try:
        tolerance = relative_error(args, student)
        whole = None
        if every.needs_logits and not packed and args.pooling is None:
            has_labels = all(objective.student.accepts(name) for name in batch.head.label_names)
            own = {n: v for n, v in batch.inputs.items() if n != LABEL_POSITIONS} if has_labels else batch.model_inputs
            outputs = student(**batch.for_student(own))
            whole = objective.student.logits_in(outputs, has_loss=batch.head.label_names[0] in own)
            if mismatch := label_loss_mismatch(batch, outputs, tolerance):
                raise ValueError(f"{mismatch} Match hidden states only, with method='hidden'.")
            if not has_known_head(student) and (batch.labels is None or not has_labels):
                raise ValueError(
                    f"{type(student).__name__} is of no task that this library knows, and without labels its own loss "
                    "doesn't show what the rows of its logits are; give labels, or match hidden states only, with "
                    "method='hidden'."
                )
        hidden, logits = objective.forward(student, batch, every)
        if whole is not None:
            expected = whole.flatten(0, -2)[... if batch.rows is None else batch.rows]
            if not _are_equal(logits, expected, tolerance):
                raise ValueError(
                    f"The logits of {type(student).__name__} for the rows that count alone are others than those of "
                    "all rows, so its head can't be run for a part. Match hidden states only, with method='hidden'."
                )
        targets = teacher.targets(batch, every) if every.needs_teacher else Targets()
        for layer, target in targets.hidden.items():
            HIDDEN_LOSSES[args.hidden_loss](hidden[layer], target, batch.weights(target))
        if targets.logits is None:
            return
        if targets.logits.shape != logits[:, : teacher.partial_forward.num_classes].shape:
            raise ValueError(
                f"The student's logits have shape {tuple(logits.shape)} and the teacher's "
                f"{tuple(targets.logits.shape)} (rows, classes); use two models of one task."
            )
    finally:
        student.train()


def relative_error(args: CurriculumDistillationConfig, model: nn.Module) -> float:
    """The relative error to expect at the precision of the computation."""
    half = args.bf16 or args.fp16 or model.dtype.itemsize < 4
    return 2**-6 if half else 1e-4


def _are_equal(logits: Tensor, expected: Tensor, tolerance: float) -> bool:
    largest = expected.abs().amax().item() if expected.numel() else 0.0
    tolerance = tolerance if expected.device.type == "cpu" else 2**-6  # accelerators may round (TF32)
    return torch.allclose(logits.float(), expected.float(), rtol=0, atol=10 * tolerance * max(1.0, largest))


def _few_examples(batch: Batch, labelled: bool, number: int = 2) -> dict[str, object]:
    """The `number` examples of a batch with the most labels; the whole batch if it cannot be split."""
    inputs, size = batch.inputs, len(batch)
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
    if len(tensors) < len(inputs) or any(not tensor.dim() or len(tensor) != size for tensor in tensors):
        return dict(inputs)
    chosen = torch.arange(min(number, size), device=tensors[0].device)
    if labelled and "labels" in inputs:
        chosen = inputs["labels"].ne(-100).view(size, -1).sum(1).topk(len(chosen)).indices
    return {name: value[chosen] for name, value in inputs.items()}
