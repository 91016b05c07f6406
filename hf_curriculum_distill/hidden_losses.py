"""Losses of hidden states: tensors in, one summed number out. Torch only.

As in [`losses`], every loss is a **sum** over the positions that count, in float32 whatever the dtype of its inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def hidden_state_mse(student: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared error between hidden states: the sum over positions of the mean over the hidden dimension.

    Zero at equality. With standardised targets, always predicting the mean costs 1.0 a position. The loss of the layer
    stages in Gupta & Karmalkar (2025, arXiv 2503.17494).

    Args:
        student: hidden states `[batch, length, hidden]`.
        target: the teacher's, projected: the same shape.
        mask: the weight of each position, `[batch, length]` (of a bool mask, positions that are True count 1); None
            gives every position the weight 1.

    Returns:
        the weighted sum, a float32 scalar.

    Raises:
        ValueError: the shapes differ.

    ```python
    >>> student, target = torch.zeros(1, 2, 4), torch.ones(1, 2, 4)
    >>> hidden_state_mse(student, target).item()
    2.0
    >>> hidden_state_mse(student, target, mask=torch.tensor([[True, False]])).item()
    1.0
    >>> hidden_state_mse(target, target).item()
    0.0

    ```
    """
    _check_same_shape(student, target)
    error = student.float() - target.float()
    if mask is None:
        return error.square().mean(-1).sum()
    # `where` rather than a product: a padded position may hold inf or nan, and 0 * nan is nan, in the gradient too
    error = torch.where((mask != 0)[..., None], error, 0.0)
    return (error.square().mean(-1) * mask).sum()


def hidden_state_cosine(student: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cosine distance between hidden states: the sum over positions of 1 minus the cosine similarity.

    Between 0 and 2 a position; zero if and only if both states have the same direction. A state of zeros has none, and
    its similarity counts as 0. Arguments, result and error as of [`hidden_state_mse`].

    ```python
    >>> student, target = torch.tensor([[[1.0, 0.0], [0.0, 3.0]]]), torch.tensor([[[2.0, 0.0], [5.0, 0.0]]])
    >>> hidden_state_cosine(student, target).item()  # the same direction, and a right angle
    1.0

    ```
    """
    _check_same_shape(student, target)
    distance = 1 - F.cosine_similarity(_counted(student, mask), _counted(target, mask), dim=-1)
    return distance.sum() if mask is None else (distance * mask).sum()


def hidden_state_layer_norm_mse(student: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """[`hidden_state_mse`] of both states after a layer norm without weights, which takes out their mean and size.

    Between 0 and 4 a position; zero if and only if each student state is its target times a positive number plus a
    number. The feature map transfer of MobileBERT (Sun et al., 2020, arXiv 2004.02984). Arguments, result and error as
    of [`hidden_state_mse`].

    ```python
    >>> target = torch.tensor([[[1.0, 2.0, 4.0]]])
    >>> hidden_state_layer_norm_mse(3 * target + 5, target).item() < 1e-9
    True

    ```
    """
    _check_same_shape(student, target)
    # BERT's epsilon: with a larger one the loss would depend on the size of small states
    normed = (F.layer_norm(_counted(states, mask), states.shape[-1:], eps=1e-12) for states in (student, target))
    return hidden_state_mse(*normed, mask)


# by the name that the config's `hidden_loss` has for it
HIDDEN_LOSSES = {
    "mse": hidden_state_mse,
    "cosine": hidden_state_cosine,
    "layer_norm_mse": hidden_state_layer_norm_mse,
}


def _check_same_shape(student: Tensor, target: Tensor) -> None:
    if student.shape != target.shape:
        raise ValueError(
            f"The student's hidden states are {tuple(student.shape)} and the teacher's, projected, "
            f"{tuple(target.shape)} (batch, positions, hidden size); they must have the same positions. Take a teacher "
            "that cuts its input into the same tokens or patches, with as many special ones."
        )


def _counted(states: Tensor, mask: Tensor | None) -> Tensor:
    """The states in float32, with zeros where the mask is 0: a padded position may hold inf or nan."""
    return states.float() if mask is None else torch.where((mask != 0)[..., None], states.float(), 0.0)
