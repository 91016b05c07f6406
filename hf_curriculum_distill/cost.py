"""Floating-point operations of a stage, counted by torch on a real batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def count_flops(forward: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products in one forward pass (a multiply-add counts as two).

    The pass runs without gradients and leaves every random state as it was. A backward pass through the same blocks
    costs twice as much: one product for the inputs' gradient and one for the weights'.
    """
    with preserved_random_state(), FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops()


@contextmanager
def preserved_random_state(seed: int | None = None) -> Iterator[None]:
    """Restore Python's, NumPy's and torch's random states (current accelerator included) on leaving.

    With a seed, the block inside starts from it.
    """
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
