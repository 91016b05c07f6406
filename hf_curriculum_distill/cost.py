"""Floating-point operations of a stage, counted by torch on a real batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from hf_curriculum_distill.randomness import preserved_random_state


def _attention_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


# torch counts the fused attention of every accelerator, but not the CPU's
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


@torch.no_grad()
def count_flops(forward: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products in one forward pass (a multiply-add counts as two).

    The pass runs without gradients and leaves every random state as it was. A backward pass through the same blocks
    costs twice as much: one product for the inputs' gradient and one for the weights'.
    """
    with preserved_random_state(), FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        forward()
    return counter.get_total_flops()
