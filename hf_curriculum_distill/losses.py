"""Losses of logits: tensors in, one summed number out. Torch only, except for [`fused_divergence`].

Every loss is a **sum** over the positions or rows that count, in float32 whatever the dtype of its inputs. The caller
divides it by how many of them count in the whole accumulated batch, on all processes together: then the loss does not
depend on how the batch is split into micro-batches.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# 16 MiB in float32: what the backward pass does not need is in memory for one chunk of rows at a time
_LOGITS_PER_CHUNK = 2**22


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """`T^2 * KL(teacher || student)`, summed over rows: both logits are divided by the temperature `T` first.

    Zero if and only if both distributions are equal. Gradients shrink as `1 / T^2`, which the factor `T^2` makes up for
    (Hinton et al., 2015, arXiv 1503.02531, section 2).

    Args:
        student_logits: `[rows, classes]`.
        teacher_logits: the same shape.
        temperature: `T`, above 0.

    Returns:
        the sum in nats, a float32 scalar.

    ```python
    >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
    >>> kl_divergence(logits, logits + 5.0).abs().item() < 1e-6  # a constant on all logits changes no probability
    True

    ```
    """
    return _sum_over_rows(_kl_divergence, student_logits, teacher_logits, temperature)


def reverse_kl_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """`T^2 * KL(student || teacher)`, summed over rows: the mode-seeking direction.

    Zero if and only if both distributions are equal. Arguments and result as of [`kl_divergence`].

    ```python
    >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
    >>> reverse_kl_divergence(logits, logits + 5.0).abs().item() < 1e-6
    True

    ```
    """
    return kl_divergence(teacher_logits, student_logits, temperature)


def jensen_shannon_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """`T^2 * (KL(teacher || m) + KL(student || m)) / 2`, summed over rows; `m` is the mean of both distributions.

    Symmetric; at most `T^2 log 2` a row; zero if and only if both distributions are equal (Lin, 1991). Arguments and
    result as of [`kl_divergence`].

    ```python
    >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
    >>> jensen_shannon_divergence(logits, logits + 5.0).abs().item() < 1e-6
    True

    ```
    """
    return _sum_over_rows(_jensen_shannon_divergence, student_logits, teacher_logits, temperature)


@dataclass
class TopLogits:
    """A teacher's distributions over `k + 1` outcomes: its `k` likeliest classes, and all others as one outcome.

    Args:
        log_probabilities: `[rows, k + 1]`, in the order of `classes`, then that of all others together; they are those
            at the temperature that [`top_logits`] was given.
        classes: class numbers `[rows, k]`, the likeliest first.
        num_classes: the number of all classes; None for as many as the student has.
    """

    log_probabilities: Tensor
    classes: Tensor
    num_classes: int | None = None

    def __getitem__(self, rows: slice) -> TopLogits:
        return TopLogits(self.log_probabilities[rows], self.classes[rows], self.num_classes)


def shared_classes(student_logits: Tensor, teacher: Tensor | TopLogits) -> Tensor:
    """The student's logits of the classes that the teacher has, too: a vocabulary may be padded to another size.

    Args:
        student_logits: `[rows, classes]`.
        teacher: logits `[rows, shared classes]`, or the result of [`top_logits`].

    ```python
    >>> shared_classes(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[4.0, 5.0]]))
    tensor([[1., 2.]])

    ```
    """
    number = teacher.num_classes if isinstance(teacher, TopLogits) else teacher.shape[-1]
    return student_logits if number in (None, student_logits.shape[-1]) else student_logits[:, :number]


def top_logits(logits: Tensor, k: int, temperature: float = 1.0) -> TopLogits:
    """Keep the `k` likeliest classes of each row.

    Args:
        logits: `[rows, classes]`.
        k: how many, fewer than there are classes.
        temperature: divides the logits.
    """
    logits = logits.float() / temperature
    return TopLogits(*_bucketed(logits, logits.topk(k, -1).indices), num_classes=logits.shape[-1])


def top_kl_divergence(student_logits: Tensor, teacher: TopLogits, temperature: float = 1.0) -> Tensor:
    """`T^2 * KL(teacher || student)`, summed over rows, for `k + 1` outcomes: the teacher's `k` classes, and any other.

    Never above [`kl_divergence`] and closer to it with a larger `k`, because merging outcomes only hides differences.
    Zero if and only if the student gives each of the `k` classes the teacher's probability.

    Args:
        student_logits: `[rows, classes]`, of all classes.
        teacher: the result of [`top_logits`] for the same rows and temperature.
        temperature: `T`, above 0.

    Returns:
        the sum in nats, a float32 scalar.

    ```python
    >>> logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    >>> top_kl_divergence(logits, top_logits(logits + 5.0, k=2)).abs().item() < 1e-6
    True

    ```
    """
    num_rows = max(1, _LOGITS_PER_CHUNK // student_logits.shape[-1])
    total = torch.zeros((), device=student_logits.device)
    chunks = (tensor.split(num_rows) for tensor in (student_logits, teacher.log_probabilities, teacher.classes))
    for student, log_probabilities, classes in zip(*chunks, strict=True):
        own, _ = _bucketed(student.float() / temperature, classes)
        total = total + _kl_divergence(own, log_probabilities)
    return temperature**2 * total


def _bucketed(logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    # sum the rest up: subtracted from 1, a small rest would be nothing but rounding error
    rest = logits.scatter(-1, classes, -math.inf).logsumexp(-1, keepdim=True)
    chosen = torch.cat([logits.gather(-1, classes), rest], -1)
    return chosen - logits.logsumexp(-1, keepdim=True), classes


def entropy(teacher: Tensor | TopLogits, temperature: float = 1.0) -> Tensor:
    """The entropy of a teacher's distributions, in nats.

    Args:
        teacher: logits `[rows, classes]`, or the result of [`top_logits`] for this temperature, whose entropy is never
            above that of all classes.
        temperature: divides the logits.

    Returns:
        `[rows]`, float32.

    ```python
    >>> (entropy(torch.tensor([[0.0, 0.0], [50.0, 0.0]])) / math.log(2)).round(decimals=3).tolist()
    [1.0, 0.0]

    ```
    """
    if isinstance(teacher, TopLogits):
        return torch.special.entr(teacher.log_probabilities.exp()).sum(-1)
    chunks = teacher.split(max(1, _LOGITS_PER_CHUNK // teacher.shape[-1]))
    return torch.cat([torch.special.entr(_log_probabilities(rows, temperature).exp()).sum(-1) for rows in chunks])


def cross_entropy(
    student_logits: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] | None = None,
) -> Tensor:
    """Cross-entropy of the student's logits with labels, summed over rows.

    Not a divergence: it is zero where the label has probability 1, whatever the teacher says.

    Args:
        student_logits: `[rows, classes]`.
        labels: class numbers `[rows]`.
        label_smoothing: the share of each label's probability that is spread evenly over all classes, 0 to 1.
        class_weights: multiply the loss of each class; None: all are 1.

    Returns:
        the sum in nats, a float32 scalar.

    ```python
    >>> round(cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3])).item() / math.log(4), 6)  # even odds, two rows
    2.0

    ```
    """
    logits = student_logits.float()
    weight = None if class_weights is None else logits.new_tensor(class_weights)
    return F.cross_entropy(logits, labels, weight, reduction="sum", label_smoothing=label_smoothing)


def squared_error(student: Tensor, target: Tensor) -> Tensor:
    """Squared error of the student's numbers, summed over rows: of a regression, in place of a divergence.

    Zero if and only if the numbers are equal.

    Args:
        student: `[rows, 1]`.
        target: the teacher's, of the same shape, or labels `[rows]`.

    Returns:
        the sum, a float32 scalar.

    ```python
    >>> squared_error(torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 5.0])).item()
    9.0

    ```
    """
    return (student.float() - target.float().view_as(student)).square().sum()


def hard_label_loss(student_logits: Tensor, teacher: Tensor | TopLogits, temperature: float = 1.0) -> Tensor:
    """Cross-entropy of the student's logits with the teacher's likeliest class, summed over rows.

    Not a divergence: it is zero where that class has probability 1 for the student, whatever it has for the teacher.
    What Panigrahi et al. (2025, arXiv 2410.05464) train with: a temperature near 0 for the teacher alone.

    Args:
        student_logits: `[rows, classes]`.
        teacher: logits of the same shape, or the result of [`top_logits`] for the same rows. Of equally likely classes
            it is the first that counts.
        temperature: always 1, because the likeliest class is the same at every temperature.

    Returns:
        the sum in nats, a float32 scalar.

    Raises:
        ValueError: the temperature is not 1.

    ```python
    >>> student = torch.zeros(1, 4)  # even odds
    >>> round(hard_label_loss(student, torch.tensor([[1.0, 5.0, 2.0, 0.0]])).item() / math.log(4), 6)
    1.0

    ```
    """
    if temperature != 1:
        raise ValueError(f"temperature is {temperature}, but the hard-label loss has none; leave it at 1.")
    if not isinstance(teacher, TopLogits):
        return cross_entropy(student_logits, teacher.argmax(-1))
    likelihoods = teacher.log_probabilities[:, :-1]
    likeliest = likelihoods == likelihoods.amax(-1, keepdim=True)
    return cross_entropy(student_logits, teacher.classes.masked_fill(~likeliest, student_logits.shape[-1]).amin(-1))


# by the name that the config's `divergence` has for it
DIVERGENCES = {
    "forward_kl": kl_divergence,
    "reverse_kl": reverse_kl_divergence,
    "jensen_shannon": jensen_shannon_divergence,
    "hard": hard_label_loss,
}
# those that can be computed from the likeliest classes alone
TOP_DIVERGENCES = {"forward_kl": top_kl_divergence, "hard": hard_label_loss}
_LIGER_BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jensen_shannon": 0.5}


def fused_divergence(name: str) -> Callable[[Tensor, Tensor, float], Tensor]:
    """One of `DIVERGENCES`, with the loss and the gradient of each chunk of rows from one kernel of Liger-Kernel.

    The teacher's logits get no gradient. There is no kernel for "hard", which torch computes.

    Args:
        name: a key of `DIVERGENCES`.

    Returns:
        a function with the arguments and the result of [`kl_divergence`].

    Raises:
        ImportError: Liger-Kernel, an optional dependency, is not installed.
    """
    if name not in _LIGER_BETAS:
        return DIVERGENCES[name]
    from liger_kernel.transformers.functional import liger_jsd

    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        return len(student) * liger_jsd(student, teacher, beta=_LIGER_BETAS[name])  # liger_jsd is a mean over rows

    return functools.partial(_sum_over_rows, divergence)


def _sum_over_rows(divergence: Callable, student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    num_rows = max(1, _LOGITS_PER_CHUNK // student_logits.shape[-1])
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
