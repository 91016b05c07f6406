"""Floating-point operations of a stage, counted by torch on a real batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_curriculum_distill.randomness import preserved_random_state


@torch.no_grad()
def count_flops(forward: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products in one forward pass (a multiply-add counts as two).

    The pass runs without gradients and leaves every random state as it was. A backward pass through the same blocks
    costs twice as much: one product for the inputs' gradient and one for the weights'.
    """
    with preserved_random_state(), FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops()
