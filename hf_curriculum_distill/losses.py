"""Losses: tensors in, one summed number out. Torch only, but for [`fused_divergence`].

Every function returns the **sum** over counted positions, in float32 whatever the dtype of its inputs. The caller
divides by the number of positions counted over the whole accumulated batch and all processes, so that the loss does
not depend on how a batch is cut into micro-batches.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK_SIZE = 2**22  # logits held at a time beside those the backward pass needs: 16 MiB in float32


def hidden_state_mse(student: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared error between hidden states: sum over positions of the mean over the hidden dimension.

    Args:
        student: `[batch, length, hidden]`.
        target: the same shape.
        mask: `[batch, length]`, the weight of each position (a bool mask counts the positions that are True);
            None counts every position.

    Zero at equality. With standardised targets, 1.0 per position is what predicting the mean would score.

    ```python
    >>> student, target = torch.zeros(1, 2, 4), torch.ones(1, 2, 4)
    >>> hidden_state_mse(student, target).item()
    2.0
    >>> hidden_state_mse(student, target, mask=torch.tensor([[True, False]])).item()
    1.0

    ```
    """
    if student.shape != target.shape:
        raise ValueError(
            f"The student's hidden states are {tuple(student.shape)} and the teacher's, projected, "
            f"{tuple(target.shape)} (batch, positions, hidden size); they must have the same positions. Take a teacher "
            "that cuts its input into the same tokens or patches, with as many special ones."
        )
    error = student.float() - target.float()
    if mask is None:
        return error.square().mean(-1).sum()
    # `where` rather than a product: a padded position may hold inf or nan, and 0 * nan is nan, in the gradient too
    error = torch.where((mask != 0)[..., None], error, 0.0)
    return (error.square().mean(-1) * mask).sum()


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """`T^2 * sum KL(teacher || student)`: sum over rows of `[rows, classes]` logits.

    Both logits are divided by the temperature `T`; the factor `T^2` keeps the gradient's size (Hinton et al., 2015).
    Zero exactly when both distributions are equal.

    ```python
    >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
    >>> kl_divergence(logits, logits + 5.0).abs().item() < 1e-6
    True

    ```
    """
    return _sum_over_rows(_kl_divergence, student_logits, teacher_logits, temperature)


def reverse_kl_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """`T^2 * sum KL(student || teacher)`: mode-seeking; zero exactly at equality. Shapes as [`kl_divergence`]."""
    return kl_divergence(teacher_logits, student_logits, temperature)


def jensen_shannon_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """`T^2 * sum (KL(teacher || m) + KL(student || m)) / 2` with `m` the even mixture of both.

    Symmetric, at most `log 2` per row (times `T^2`), zero exactly at equality. Shapes as [`kl_divergence`].
    """
    return _sum_over_rows(_jensen_shannon_divergence, student_logits, teacher_logits, temperature)


@dataclass
class TopLogits:
    """What is left of a teacher's logits `[rows, classes]`: its likeliest classes, and all others as one.

    Args:
        log_probabilities: `[rows, k + 1]`, of the classes below, then of all others together, at the temperature.
        classes: `[rows, k]`, likeliest first.
    """

    log_probabilities: Tensor
    classes: Tensor

    def __getitem__(self, rows: slice) -> TopLogits:
        return TopLogits(self.log_probabilities[rows], self.classes[rows])


def top_logits(logits: Tensor, k: int, temperature: float = 1.0) -> TopLogits:
    """Keep the `k` likeliest classes of each row, fewer than there are."""
    logits = logits.float() / temperature
    return TopLogits(*_bucketed(logits, logits.topk(k, -1).indices))


def top_kl_divergence(student_logits: Tensor, teacher: TopLogits, temperature: float = 1.0) -> Tensor:
    """`T^2 * sum KL(teacher || student)` over `k + 1` outcomes: the teacher's likeliest classes, and any other.

    Never above [`kl_divergence`] and the closer to it the larger `k` is, because merging outcomes only hides
    differences; zero where the student gives each of the classes, so also the rest, the teacher's probability.
    """
    num_rows = max(1, _BLOCK_SIZE // student_logits.shape[-1])
    total = torch.zeros((), device=student_logits.device)
    blocks = (tensor.split(num_rows) for tensor in (student_logits, teacher.log_probabilities, teacher.classes))
    for student, log_probabilities, classes in zip(*blocks, strict=True):
        own, _ = _bucketed(student.float() / temperature, classes)
        total = total + _kl_divergence(own, log_probabilities)
    return temperature**2 * total


def _bucketed(logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    # the rest is summed up, not subtracted from 1, which would leave rounding alone where it is small
    rest = logits.scatter(-1, classes, -math.inf).logsumexp(-1, keepdim=True)
    chosen = torch.cat([logits.gather(-1, classes), rest], -1)
    return chosen - logits.logsumexp(-1, keepdim=True), classes


def cross_entropy(student_logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of `[rows, classes]` logits with integer labels `[rows]`, summed over rows."""
    return F.cross_entropy(student_logits.float(), labels, reduction="sum", label_smoothing=label_smoothing)


DIVERGENCES = {
    "forward_kl": kl_divergence,
    "reverse_kl": reverse_kl_divergence,
    "jensen_shannon": jensen_shannon_divergence,
}
_LIGER_BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jensen_shannon": 0.5}


def fused_divergence(name: str) -> Callable[[Tensor, Tensor, float], Tensor]:
    """One of `DIVERGENCES`, with each block's loss and gradient from one Triton kernel, Liger-Kernel's.

    The teacher's logits get no gradient.
    """
    from liger_kernel.transformers.functional import liger_jsd  # an extra

    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        return len(student) * liger_jsd(student, teacher, beta=_LIGER_BETAS[name])  # which is a mean over rows

    return functools.partial(_sum_over_rows, divergence)


def _sum_over_rows(divergence: Callable, student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    # by blocks of rows: what the backward pass does not need is held for one block at a time
    num_rows = max(1, _BLOCK_SIZE // student_logits.shape[-1])
    total = torch.zeros((), device=student_logits.device)
    for student, teacher in zip(student_logits.split(num_rows), teacher_logits.split(num_rows), strict=True):
        total = total + divergence(_log_probabilities(student, temperature), _log_probabilities(teacher, temperature))
    return temperature**2 * total


def _kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(student, teacher, reduction="sum", log_target=True)


def _jensen_shannon_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    mixture = torch.logaddexp(student, teacher) - math.log(2)
    return (_kl_divergence(mixture, teacher) + _kl_divergence(mixture, student)) / 2


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.float()
    return F.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)
