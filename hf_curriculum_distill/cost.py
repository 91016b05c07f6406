"""Floating-point operations of a pass, of a stage, and of each of its tokens, counted by torch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.module_tracker import ModuleTracker

from hf_curriculum_distill.batches.batch import Batch
from hf_curriculum_distill.batches.randomness import preserved_random_state
from hf_curriculum_distill.layers.chunks import RowLogits
from hf_curriculum_distill.objective import Objective
from hf_curriculum_distill.stages import Stage
from hf_curriculum_distill.teachers.cached import CachedTeacher
from hf_curriculum_distill.teachers.teacher import Teacher

# torch counts fused attention on accelerators, but not on the CPU
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, **kwargs: sdpa_flop_count(
        q, k, v
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *args, **kwargs: (
        sdpa_backward_flop_count(grad, q, k, v)
    ),
}

_OF_TOKENS = ("scaled_dot_product", "bmm")  # in the names of operations that multiply tokens with tokens


def flop_counter() -> FlopCounterMode:
    """torch's counter of operations in matrix products (a multiply-add is two), CPU attention included."""
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    counter.mod_tracker = _NoModules()
    return counter


class _NoModules(ModuleTracker):
    """Does not track modules: only totals are needed.

    Without gradients, torch's tracker fails if a module's input is a parameter.
    """

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass


@torch.no_grad()
def count_flops(forward: Callable[[], tuple[object, Tensor | RowLogits | None]]) -> np.ndarray:
    """Count the floating-point operations of the matrix products in one forward pass (a multiply-add counts as two).

    The pass runs without gradients and does not change any random state. A backward pass through the same blocks costs
    twice as much: one product for the gradient of the inputs, one for that of the weights.

    Args:
        forward: returns hidden states and logits, as [`PartialForward`] does.

    Returns:
        `[2]`: products with weights, which grow with the number of tokens; and products of tokens with tokens, in
        attention, which grow with its square.
    """
    with preserved_random_state(), flop_counter() as counter:
        _, logits = forward()
        if isinstance(logits, RowLogits):  # not computed yet
            logits.run()
    counts = counter.get_flop_counts().get("Global", {})
    attention = sum(n for operation, n in counts.items() if any(name in str(operation) for name in _OF_TOKENS))
    return np.array([sum(counts.values()) - attention, attention])


def stage_flops(
    objective: Objective, teacher: Teacher | CachedTeacher | None, batch: Batch, stage: Stage, frozen: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Operations of the student (forward and backward) and of the teacher for one batch of a stage.

    A teacher that learns also trains on the same rows.

    Args:
        frozen: the highest layer of the student that gets no gradient (0: the embeddings); None for none.

    Returns:
        two arrays, each as in [`count_flops`].
    """
    student, of_teacher = objective.student.model, np.zeros(2, np.int64)
    forward = count_flops(lambda: objective.forward(student, batch, stage))
    backward = 2 * forward
    if frozen is not None:
        backward -= 2 * count_flops(lambda: objective.forward(student, batch, Stage(hidden=[(frozen, 0)])))
    if stage.needs_teacher:
        of_teacher += count_flops(lambda: teacher.forward(batch, stage))
    if teacher is not None and teacher.learns:
        of_teacher += 3 * count_flops(lambda: teacher.forward(batch, Stage(kl_weight=1.0)))
    return forward + backward, of_teacher


def flop_rates(
    objective: Objective, teacher: Teacher | CachedTeacher | None, batch: Batch, stage: Stage, frozen: int | None = None
) -> list[list[float]]:
    """Operations for each of [`flop_units`], measured on one batch.

    Args:
        objective, teacher, batch, stage, frozen: see [`stage_flops`].

    Returns:
        `[3][2]`: for each unit, the operations of the student and of the teacher.
    """
    num_inputs, num_squares, num_rows = flop_units(teacher, batch, stage)
    whole, per_row = np.array(stage_flops(objective, teacher, batch, stage, frozen)), np.zeros(2)
    if num_rows > 1:
        with_one = np.array(stage_flops(objective, teacher, batch.with_rows(batch.rows[:1]), stage, frozen))
        per_row = (whole - with_one).sum(1) / (num_rows - 1)
    else:
        num_rows = 0
    per_input, per_square = (whole[:, 0] - num_rows * per_row) / num_inputs, whole[:, 1] / num_squares
    return [per_input.tolist(), per_square.tolist(), per_row.tolist()]


def flop_units(teacher: Teacher | CachedTeacher | None, batch: Batch, stage: Stage) -> tuple[int, float, int]:
    """The numbers that a batch's operations grow with.

    Args:
        teacher: says what it computes, which is more than the stage needs if it fills a cache; None without one.

    Returns:
        the number of elements of its main input; the sum over examples of the square of that number; and the number of
        rows of logits, 0 if none are computed.
    """
    wanted, size = teacher.wanted(stage) if teacher else stage, batch.main_input.numel()
    computes_rows = stage.needs_logits or wanted.needs_logits or (teacher is not None and teacher.learns)
    return size, size**2 / len(batch), batch.num_rows if computes_rows else 0
