"""Memory of an optimizer: what it holds for each parameter, and what a step needs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.planning.memory import PeakMemory


class OptimizerMemory:
    """Bytes of the run's optimizer, found by taking steps on parameters that have a shape but no values.

    Args:
        args: names the optimizer and its options.

    Attributes:
        untried: why it takes no steps here, in one line, if it does not; it is then counted as Adam.
    """

    def __init__(self, args: CurriculumDistillationConfig):
        self.untried: str | None = None
        self._args = args
        self._known: dict[tuple[torch.Size, torch.dtype, bool], tuple[int, int]] = {}

    def measure(self, parameter: Tensor, embeds: bool = False) -> tuple[int, int]:
        """Measure the memory for one parameter.

        Args:
            parameter: of any shape; its values are not read.
            embeds: it is an embedding's, whose states `Trainer` keeps in 32 bits when others have 8.

        Returns:
            Bytes of the states that are held from the first step on, and bytes that each step needs for itself.
        """
        kind = parameter.shape, parameter.dtype, embeds
        if kind not in self._known:
            try:
                self._known[kind] = self._take_steps(*kind)
            except Exception as error:  # of any kind: optimizers come from many libraries
                self.untried = f"{type(error).__name__}: {error}".splitlines()[0]
                self._known[kind] = 2 * parameter.nbytes, 0
        return self._known[kind]

    def _take_steps(self, shape: torch.Size, dtype: torch.dtype, embeds: bool) -> tuple[int, int]:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(self._args)
        fused = options.pop("fused", False)  # a fused step needs values, and no memory of its own
        if embeds and options.get("optim_bits") == 8:
            options["optim_bits"] = 32  # as Trainer does
        parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
        optimizer = optimizer_class([parameter], **options)
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        with PeakMemory() as memory:
            optimizer.step()
        states = [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor) and value.dim()]
        return sum(map(_stored_bytes, states)), 0 if fused else memory.peak


def _stored_bytes(tensor: Tensor) -> int:
    """Bytes of the tensors that a tensor consists of: a quantised one has values and scales."""
    parts = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
    return sum(_stored_bytes(getattr(tensor, part)) for part in parts) or tensor.nbytes
