"""Running totals of a training run: loss terms since the last log, floating-point operations since the start."""

from __future__ import annotations

import operator
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from hf_curriculum_distill.logs import get_logger

logger = get_logger(__name__)


class RunningTotals:
    """Adds up on the device and reads the sums once per log, so that no micro-batch waits for the device.

    Attributes:
        flops: student's and teacher's floating-point operations since the start of the run, of this process.
        total_flops: the same of all processes, as of the last log or checkpoint.
        rates: `stage -> [[student's, teacher's] operations for one of each unit]`, units as in [`add_flops`].
        unlogged: the sums of each process since the last log, as of the last checkpoint, in plain JSON values.
        seconds: for which the run has trained, in all its parts if it was resumed.
    """

    def __init__(self):
        self._terms: dict[str, Tensor] = {}
        self._first_step = 0
        self.flops = [0.0, 0.0]
        self.total_flops = {"student_flops": 0.0, "teacher_flops": 0.0}
        self.rates: dict[int, list[list[float]]] = {}
        self.unlogged: dict[str, Any] = {}
        self._seconds = 0.0  # until the clock was started
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        return self._seconds + (0.0 if self._started is None else time.monotonic() - self._started)

    def start_clock(self) -> None:
        """Begin to count `seconds`."""
        self._started = time.monotonic()

    def stop_clock(self) -> None:
        """Count `seconds` no further."""
        self._seconds, self._started = self.seconds, None

    def start(self, step: int) -> None:
        """Forget the terms, which were logged; the next log averages over the optimizer steps after `step`."""
        self._terms, self._first_step = {}, step

    def add_terms(self, terms: Mapping[str, Tensor]) -> None:
        """Add a micro-batch's loss terms, scalars on the device, by name."""
        for name, term in terms.items():
            self._terms[name] = self._terms.get(name, 0.0) + term.detach()

    def set_rates(self, stage: int, rates: list[list[float]], accelerator: Accelerator) -> None:
        """Set a stage's rates to the mean over the processes, each of which measured its own batch; collective.

        Args:
            stage: its index.
            rates: as in `rates`.
            accelerator: of this process.
        """
        self.rates[stage] = accelerator.reduce(_on_device(rates, accelerator), "mean").tolist()

    def add_flops(self, stage: int, units: Sequence[float], teacher: bool = True) -> float:
        """Add a micro-batch's floating-point operations.

        Args:
            stage: its index.
            units: elements of the model's main input, sum of their squared number over examples, and rows of logits.
            teacher: whether the teacher ran.

        Returns:
            The operations of student and teacher together.
        """
        per_student, per_teacher = zip(*self.rates[stage], strict=True)
        added = [sum(map(operator.mul, units, rates)) for rates in (per_student, per_teacher)]
        added[1] *= teacher
        self.flops = [total + new for total, new in zip(self.flops, added, strict=True)]
        return sum(added)

    def terms(self, accelerator: Accelerator, step: int) -> dict[str, float]:
        """Mean of each term over the optimizer steps since the last [`start`] and all processes' data; collective.

        Args:
            accelerator: of this process.
            step: the present optimizer step.
        """
        if not self._terms:
            return {}
        sums = accelerator.reduce(torch.stack(list(self._terms.values())).float(), "sum").tolist()
        return {name: total / max(1, step - self._first_step) for name, total in zip(self._terms, sums, strict=True)}

    def reduce_flops(self, accelerator: Accelerator) -> dict[str, float]:
        """Bring `total_flops` up to date and return it; collective."""
        totals = accelerator.reduce(_on_device(self.flops, accelerator), "sum").tolist()
        self.total_flops = dict(zip(self.total_flops, totals, strict=True))
        return self.total_flops

    def collect(self, accelerator: Accelerator, loss: Tensor) -> None:
        """Bring `unlogged` and `total_flops` up to date before a checkpoint; collective.

        Args:
            accelerator: of this process.
            loss: this process's loss since the last log, which Trainer adds up.
        """
        self.reduce_flops(accelerator)
        own = [*self.flops, *(float(value) for value in (loss, *self._terms.values()))]
        processes = accelerator.gather(_on_device(own, accelerator)[None]).tolist()
        self.unlogged = {"first_step": self._first_step, "terms": list(self._terms), "processes": processes}

    def restore(self, record: Mapping[str, Any], accelerator: Accelerator) -> float:
        """Go on from a checkpoint's record.

        Args:
            record: what [`read_record`] reads.
            accelerator: of this process.

        Returns:
            This process's loss since the last log.
        """
        self.total_flops = {name: record[name] for name in self.total_flops}
        self.rates = {int(index): rates for index, rates in record["flop_rates"].items()}
        self._seconds = record.get("train_seconds", 0.0)  # records of earlier versions lack it
        self.start(record["unlogged"]["first_step"])
        processes = record["unlogged"]["processes"]
        if len(processes) == accelerator.num_processes:
            own = processes[accelerator.process_index]
        else:
            logger.warning(
                "The checkpoint is of %d processes and %d resume it: the data come in another order, and the next "
                "logged averages are approximate.",
                len(processes),
                accelerator.num_processes,
            )
            own = [sum(values) / accelerator.num_processes for values in zip(*processes, strict=True)]
        *self.flops, loss = own[:3]
        for name, value in zip(record["unlogged"]["terms"], own[3:], strict=True):
            self._terms[name] = torch.tensor(value, device=accelerator.device)
        return loss


def _on_device(values: list, accelerator: Accelerator) -> Tensor:
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    return torch.tensor(values, dtype=dtype, device=accelerator.device)
