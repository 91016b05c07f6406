"""Learning-rate schedules as functions of the step: nothing to save, nothing to drift."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from hf_curriculum_distill.stages import StageScheduler


def restarted_schedule(
    stages: StageScheduler, name: str, learning_rate: float, warmup_ratio: float, kwargs: dict[str, Any]
) -> Callable[[int], float]:
    """`step -> learning-rate factor`: transformers' schedule `name`, once over each stage with its own warm-up."""
    spans = [stages.span(index) for index in range(len(stages.stages))]
    factors = [
        schedule_factor(name, end - start, learning_rate, math.ceil(warmup_ratio * (end - start)), kwargs)
        for start, end in spans
    ]

    def factor(step: int) -> float:
        index = stages.index_at(min(step, stages.max_steps - 1))
        return factors[index](step - spans[index][0])

    return factor


def schedule_factor(
    name: str, num_steps: int, learning_rate: float, num_warmup_steps: int, kwargs: dict[str, Any]
) -> Callable[[int], float]:
    """`step -> learning-rate factor` of transformers' schedule `name`."""
    throwaway = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=learning_rate)
    schedule = get_scheduler(
        name,
        throwaway,
        num_warmup_steps=num_warmup_steps,
        num_training_steps=num_steps,
        scheduler_specific_kwargs=kwargs,
    )
    return schedule.lr_lambdas[0]
