"""Losses: tensors in, one summed number out. Torch only.

Every function returns the **sum** over counted positions, in float32 whatever the dtype of its inputs. The caller
divides by the number of positions counted over the whole accumulated batch and all processes, so that the loss does
not depend on how a batch is cut into micro-batches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    student = _log_probabilities(student_logits, temperature)
    teacher = _log_probabilities(teacher_logits, temperature)
    return temperature**2 * F.kl_div(student, teacher, reduction="sum", log_target=True)


def reverse_kl_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """`T^2 * sum KL(student || teacher)`: mode-seeking; zero exactly at equality. Shapes as [`kl_divergence`]."""
    return kl_divergence(teacher_logits, student_logits, temperature)


def jensen_shannon_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """`T^2 * sum (KL(teacher || m) + KL(student || m)) / 2` with `m` the even mixture of both.

    Symmetric, at most `log 2` per row (times `T^2`), zero exactly at equality. Shapes as [`kl_divergence`].
    """
    student = _log_probabilities(student_logits, temperature)
    teacher = _log_probabilities(teacher_logits, temperature)
    log_two = torch.log(torch.tensor(2.0, device=student.device))
    mixture = torch.logaddexp(student, teacher) - log_two
    both = F.kl_div(mixture, teacher, reduction="sum", log_target=True)
    both = both + F.kl_div(mixture, student, reduction="sum", log_target=True)
    return temperature**2 * both / 2


def cross_entropy(student_logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of `[rows, classes]` logits with integer labels `[rows]`, summed over rows."""
    return F.cross_entropy(student_logits.float(), labels, reduction="sum", label_smoothing=label_smoothing)


DIVERGENCES = {
    "forward_kl": kl_divergence,
    "reverse_kl": reverse_kl_divergence,
    "jensen_shannon": jensen_shannon_divergence,
}


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(logits.float() / temperature, dim=-1)
