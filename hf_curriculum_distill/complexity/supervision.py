"""Supervision complexity: how complex targets are for a kernel, and the margin bound that it is a term of."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class SupervisionComplexity(NamedTuple):
    """A supervision complexity with its sensitivity to the ridge.

    Args:
        value: with the ridge that was asked for.
        at_tenth_ridge, at_tenfold_ridge: with 0.1 and 10 times that ridge. The value falls as the ridge rises; if the
            three differ much, it is the ridge that is measured.
    """

    value: float
    at_tenth_ridge: float
    at_tenfold_ridge: float


def supervision_complexity(
    ntk: Tensor, targets: Tensor, adjusted: bool = True, ridge: float = 1e-6
) -> SupervisionComplexity:
    """How complex targets are for a kernel: `Y^T K^-1 Y`, the squared norm of the function that fits them.

    Adjusted, it is `1/N sqrt(Y^T K^-1 Y * Tr K)` for N targets, which scaling the kernel does not change
    (Harutyunyan et al., ICLR 2023, arXiv 2301.12245): up to a factor the second term of [`margin_bound`]. Random
    targets of +1 and -1 have a mean square of at least `1 / (1 + ridge)`, for `Tr K * Tr K^-1 >= N^2`; targets along
    the kernel's first eigenvectors have less. It is linear in the targets' scale: compare targets of a common one.

    Args:
        ntk: the kernel of held-out rows, symmetric: `[n * d, n * d]`; `[d, n, n]`, one for each output, which takes the
            products of two outputs as 0; or `[n, n]`, which takes it as the kernel of each output.
        targets: `[n, d]`, or `[n]` for one output; numbers that outputs shall equal, no class numbers. A classifier's
            are best centred, as one-hot labels less `1 / classes`.
        adjusted: whether the value is adjusted; if not, it is `Y^T K^-1 Y`.
        ridge: what is added to the kernel's diagonal before the inversion, in units of its mean, `Tr K / N`.

    Returns:
        the value, and those at 0.1 and 10 times the ridge, without units if adjusted.

    Raises:
        ValueError: the shapes do not match, numbers are not finite, the kernel is not symmetric or, with 0.1 times the
            ridge, not positive definite.

    ```python
    >>> kernel = torch.diag(torch.tensor([3.0, 1.0]))
    >>> round(supervision_complexity(kernel, torch.tensor([1.0, 1.0]), ridge=0.0).value ** 2, 9)  # (1/3 + 1) 4 / 2^2
    1.333333333

    ```
    """
    kernels, columns, num_targets, trace = _matched(ntk, targets)
    if not (math.isfinite(ridge) and ridge >= 0):
        raise ValueError(f"ridge is {ridge}; it is added to a kernel's diagonal, so it must be 0 or a positive number.")

    def at(factor: float) -> float:
        shift = factor * ridge * trace / num_targets
        shifted = kernels + shift * torch.eye(kernels.shape[-1], dtype=kernels.dtype, device=kernels.device)
        factors, failures = torch.linalg.cholesky_ex(shifted)
        if failures.any():
            raise ValueError(
                f"The kernel with {shift:.3g} ({factor * ridge:.3g} of its mean) added to its diagonal is not positive "
                "definite, so it has no inverse; raise ridge, or compute the kernel from a float64 model."
            )
        half = torch.linalg.solve_triangular(factors, columns, upper=False)
        value = float(half.square().sum())
        return math.sqrt(value * trace) / num_targets if adjusted else value

    return SupervisionComplexity(at(1.0), at(0.1), at(10.0))


def relative_complexity(ntk: Tensor, targets: Tensor, ridge: float = 1e-6) -> float:
    """The adjusted [`supervision_complexity`] of targets, as a share of what random ones have with the same kernel.

    `sqrt(Y^T K^-1 Y / E[R^T K^-1 R])` for independent random targets R of the mean square of Y: 1 is as hard as random.
    Two kernels, such as those of two layers, differ in what even random targets cost, which is left out here, as are
    the scales of kernel and targets.

    Args:
        ntk: `[n, n]`, the kernel of each of the targets' columns.
        targets: `[n, d]`.
        ridge: as there.

    Returns:
        the share, without units; 0 for targets that are all 0.

    Raises:
        ValueError: as there.

    ```python
    >>> kernel = torch.diag(torch.tensor([4.0, 1.0]))
    >>> easy, hard = torch.eye(2)
    >>> round(relative_complexity(kernel, easy, ridge=0.0) ** 2, 9)  # 1/4, of 1/2 (1/4 + 1)
    0.4
    >>> round(relative_complexity(kernel, hard, ridge=0.0) ** 2, 9)  # 1, of the same
    1.6

    ```
    """
    size = float(targets.double().square().mean().sqrt())
    random = math.sqrt(len(ntk)) * torch.eye(len(ntk), dtype=torch.float64)  # as E[R R^T] is d times the identity
    of_random = supervision_complexity(ntk, random, ridge=ridge).value
    return supervision_complexity(ntk, targets, ridge=ridge).value / of_random / size if size else 0.0


def margin_bound(margins: Tensor, trace: float, norm: float, gamma: float, delta: float = 0.05) -> float:
    """An upper bound of the probability that a function of bounded norm has the wrong sign.

    With probability `1 - delta` over n examples, every f in the kernel's space with `|f| <= norm` has
    `P(Y f <= 0) <= 1/n sum 1{Y_i f(x_i) <= gamma} + 2 norm / (gamma n) sqrt(Tr K) + 3 sqrt(ln(2 / delta) / (2 n))`
    (a Rademacher bound, on which Harutyunyan et al., arXiv 2301.12245, build). For the function that fits targets of +1
    and -1, with `norm^2 = Y^T K^-1 Y`, the second term is 2 / gamma times the adjusted supervision complexity.

    Args:
        margins: `Y_i f(x_i)`, `[n]`.
        trace: of the kernel on these examples.
        norm: a bound of f's norm, chosen before the examples are seen, like gamma.
        gamma: the margin.
        delta: the probability with which the bound may fail.

    Returns:
        the bound; at 1 and above it says nothing.

    Raises:
        ValueError: a number is not finite or not in its range, or there are no margins.

    ```python
    >>> round(margin_bound(torch.ones(10_000), trace=10_000, norm=10.0, gamma=0.5), 4)  # 0 + 0.4 + 0.0407
    0.4407

    ```
    """
    if margins.dim() != 1 or not len(margins) or not margins.isfinite().all():
        raise ValueError(f"margins have shape {tuple(margins.shape)}; give finite numbers [n], with n at least 1.")
    for name, value in {"trace": trace, "norm": norm}.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value}; it must be 0 or a positive number.")
    if not (math.isfinite(gamma) and gamma > 0):
        raise ValueError(f"gamma is {gamma}; a margin must be positive, as the bound divides by it.")
    if not 0 < delta < 1:
        raise ValueError(f"delta is {delta}; a probability of failure must be between 0 and 1.")
    n = len(margins)
    within = float((margins <= gamma).double().mean())
    return within + 2 * norm / (gamma * n) * math.sqrt(trace) + 3 * math.sqrt(math.log(2 / delta) / (2 * n))


def _matched(ntk: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, int, float]:
    """Kernels `[kernels, rows, rows]` and their targets `[kernels, rows, k]`; the number of targets; the trace."""
    targets = targets[:, None] if targets.dim() == 1 else targets
    if ntk.dim() not in (2, 3) or ntk.shape[-1] != ntk.shape[-2] or targets.dim() != 2 or not targets.numel():
        raise ValueError(
            f"A kernel {list(ntk.shape)} and targets {list(targets.shape)} do not match; give [n * d, n * d], "
            "[d, n, n] or [n, n], and [n, d]."
        )
    n, d = targets.shape
    kernels = ntk.double().reshape(-1, *ntk.shape[-2:])
    columns = targets.to(kernels)
    if ntk.shape == (d, n, n):
        columns = columns.T[..., None]
    elif ntk.shape == (n * d, n * d):
        columns = columns.reshape(1, -1, 1)
    elif ntk.shape != (n, n):
        raise ValueError(
            f"A kernel {list(ntk.shape)} and targets {list(targets.shape)} do not match; give [n * d, n * d], "
            "[d, n, n] or [n, n], and [n, d]."
        )
    if not (kernels.isfinite().all() and columns.isfinite().all()):
        raise ValueError("The kernel or the targets are not finite; the model that they are of has diverged.")
    if not torch.allclose(kernels, kernels.mT, rtol=0, atol=1e-9 * float(kernels.abs().max())):
        raise ValueError("The kernel is not symmetric; give products of gradients, as empirical_ntk does.")
    shared = d if ntk.shape == (n, n) and d > 1 else 1
    trace = shared * float(kernels.diagonal(dim1=1, dim2=2).sum())
    if trace <= 0:
        raise ValueError(f"The kernel's trace is {trace}; one of gradients has a positive trace.")
    return kernels, columns, n * d, trace
