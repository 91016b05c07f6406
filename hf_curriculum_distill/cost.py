"""Floating-point operations of a stage, counted by torch on a real batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.module_tracker import ModuleTracker

from hf_curriculum_distill.randomness import preserved_random_state

# torch counts the fused attention of every accelerator, but not the CPU's
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, **kwargs: sdpa_flop_count(
        q, k, v
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *args, **kwargs: (
        sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def flop_counter() -> FlopCounterMode:
    """torch's counter of operations in matrix products (a multiply-add is two), CPU attention included."""
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    counter.mod_tracker = _NoModules()
    return counter


class _NoModules(ModuleTracker):
    """Only totals are wanted; without gradients torch's tracker fails where a module's input is a parameter."""

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass


@torch.no_grad()
def count_flops(forward: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products in one forward pass (a multiply-add counts as two).

    The pass runs without gradients and leaves every random state as it was. A backward pass through the same blocks
    costs twice as much: one product for the inputs' gradient and one for the weights'.
    """
    with preserved_random_state(), flop_counter() as counter:
        forward()
    return counter.get_total_flops()
