"""Mean, variance and covariance of vectors that come batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NOT_ROUNDING = 1e-6  # part of the values' size from which a deviation is more than the rounding of float32 values


@dataclass
class Moments:
    """Number, mean and scatter of vectors, brought up to date batch by batch (Chan et al., 1983).

    Attributes:
        count: the number of vectors.
        mean: `[dim]`; 0 before the first vector.
        scatter: the sum of squared deviations from the mean, `[dim]`, or of their products, `[dim, dim]`.

    ```python
    >>> moments = Moments()
    >>> for batch in (torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0]])):
    ...     moments.add(batch)
    >>> moments
    Moments(count=3, mean=tensor([3.]), scatter=tensor([14.]))

    ```
    """

    count: int = 0
    mean: Tensor | float = 0.0
    scatter: Tensor | float = 0.0

    def add(self, values: Tensor, products: bool = False) -> None:
        """Add vectors.

        Args:
            values: `[vectors, dim]`, in the precision to compute in.
            products: whether `scatter` has the products of all pairs of coordinates, or squares alone.
        """
        if not (count := len(values)):
            return
        before, own_mean, total = self.count, values.mean(0), self.count + count
        deviations, delta = values - own_mean, own_mean - self.mean
        within = deviations.T @ deviations if products else deviations.square().sum(0)
        between = torch.outer(delta, delta) if products else delta**2
        self.scatter = self.scatter + within + between * (before * count / total)
        self.count, self.mean = total, self.mean + delta * (count / total)

    @property
    def std(self) -> Tensor:
        """The standard deviation of each coordinate, `[dim]`, from a scatter of squares."""
        return (self.scatter / self.count).sqrt()

    @property
    def varies(self) -> Tensor:
        """Whether each coordinate varies, `[dim]`: the last bits of constant values differ by rounding."""
        return self.std > NOT_ROUNDING * (self.mean.square() + self.std.square()).sqrt()

    def projected(self, weight: Tensor) -> Moments:
        """The moments, with squares alone, of `weight @ vector`, from a scatter of products.

        Args:
            weight: `[rows, dim]`.
        """
        squares = ((weight @ self.scatter) * weight).sum(1).clamp(min=0)  # rounding may go below
        return Moments(self.count, weight @ self.mean, squares)


def measure(
    teacher: Callable[[Any, Sequence[int]], tuple[Mapping[int, Tensor], Tensor]],
    dataloader: Iterable[Any],
    layer_of: Mapping[Any, int],
    vectors_of: Callable[[Any, Tensor], Tensor] = lambda name, states: states,
    products: bool = False,
) -> dict[Any, Moments]:
    """The moments, in float64, of what is made of a teacher's hidden states on a sample.

    Args:
        teacher, dataloader: as for [`ProjectionBank.fit`].
        layer_of: the layer whose states each result is of, by the result's name.
        vectors_of: called as `vectors_of(name, states)` with the states that count, `[positions, teacher_dim]`; returns
            the vectors, `[positions, dim]`.
        products: as for [`Moments.add`].

    Returns:
        the moments by name.

    Raises:
        ValueError: no position of the sample counts.
        FloatingPointError: the teacher's states are not finite.
    """
    moments, layers = {name: Moments() for name in layer_of}, sorted({*layer_of.values()})
    for batch in dataloader:
        hidden, mask = teacher(batch, layers)
        for name, own in moments.items():
            states = hidden[layer_of[name]]
            own.add(vectors_of(name, states[mask.expand(states.shape[:2]) != 0]).double(), products)
    for name, own in moments.items():
        if not own.count:
            raise ValueError("The calibration sample has no position that counts; give a larger one.")
        if not torch.isfinite(own.scatter).all():
            raise FloatingPointError(f"The teacher's hidden states at layer {layer_of[name]} are not finite.")
    return moments


def apply_matrix(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`weight @ hidden + bias` in float32, even under autocast."""
    if not torch.is_autocast_enabled(hidden.device.type):
        return F.linear(hidden.float(), weight, bias)
    with torch.autocast(hidden.device.type, enabled=False):  # targets belong to the loss, which is float32
        return F.linear(hidden.float(), weight, bias)
