"""Running totals of a training run: loss terms between two logs, floating-point operations since its start."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor


class Ledger:
    """Adds up on the device and talks to the host once a log, so that no micro-batch waits for the device.

    Attributes:
        flops: student's and teacher's floating-point operations since the start of the run, of this process.
        total_flops: the same of all processes, as of the last [`reduce_flops`].
        flops_per_input: the same for one element of the model's main input, by stage: measured once a stage.
    """

    def __init__(self):
        self._terms: dict[str, Tensor] = {}
        self._first_step = 0
        self.flops = [0.0, 0.0]
        self.total_flops = {"student_flops": 0.0, "teacher_flops": 0.0}
        self.flops_per_input: dict[int, list[float]] = {}

    def start(self, step: int) -> None:
        """Forget the terms of an interrupted run; the next log averages from `step` on."""
        self._terms, self._first_step = {}, step

    def add_terms(self, terms: Mapping[str, Tensor]) -> None:
        for name, term in terms.items():
            self._terms[name] = self._terms.get(name, 0.0) + term.detach()

    def add_flops(self, stage: int, num_inputs: int) -> float:
        """Book a micro-batch of so many input elements; returns its floating-point operations."""
        added = [rate * num_inputs for rate in self.flops_per_input[stage]]
        self.flops = [total + new for total, new in zip(self.flops, added, strict=True)]
        return sum(added)

    def terms(self, accelerator: Accelerator, step: int) -> dict[str, float]:
        """Mean of each term over the optimizer steps since the last [`start`] and over all processes' data."""
        if not self._terms:
            return {}
        sums = accelerator.reduce(torch.stack(list(self._terms.values())).float(), "sum").tolist()
        return {name: total / max(1, step - self._first_step) for name, total in zip(self._terms, sums, strict=True)}

    def reduce_flops(self, accelerator: Accelerator) -> dict[str, float]:
        """Bring `total_flops` up to date and return it. Every process must take part."""
        dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
        totals = accelerator.reduce(torch.tensor(self.flops, dtype=dtype, device=accelerator.device), "sum").tolist()
        self.total_flops = dict(zip(self.total_flops, totals, strict=True))
        return self.total_flops
