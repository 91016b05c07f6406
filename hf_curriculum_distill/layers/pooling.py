"""What models without a head make of an example: one vector, of the hidden states of its tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def pooled(kind: str, states: Tensor, weights: Tensor) -> Tensor:
    """One vector for each example.

    Args:
        kind: "mean" over the positions that count, "cls" for the first position, or "last" for the last that counts.
        states: `[batch, length, hidden]`.
        weights: of each position, `[batch, length]`; 0 where it does not count.

    Returns:
        `[batch, hidden]`, float32.

    ```python
    >>> states, mask = torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]])
    >>> [pooled(kind, states, mask).item() for kind in ("mean", "cls", "last")]
    [2.0, 1.0, 3.0]

    ```
    """
    states, counts = states.float(), weights != 0
    if kind == "cls":
        return states[:, 0]
    if kind == "last":
        positions = torch.arange(states.shape[1], device=states.device)
        return states[torch.arange(len(states), device=states.device), (positions * counts).amax(1)]
    # `where`, because padding may hold inf or nan
    total = (torch.where(counts[..., None], states, 0.0) * weights[..., None]).sum(1)
    return total / weights.sum(1, keepdim=True)
