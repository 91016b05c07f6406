"""Learning-rate schedules that start anew in each stage."""

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
    factors = [_factor(name, end - start, learning_rate, warmup_ratio, kwargs) for start, end in spans]

    def factor(step: int) -> float:
        index = stages.index_at(min(step, stages.max_steps - 1))
        return factors[index](step - spans[index][0])

    return factor


def _factor(
    name: str, num_steps: int, learning_rate: float, warmup_ratio: float, kwargs: dict[str, Any]
) -> Callable[[int], float]:
    throwaway = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=learning_rate)
    schedule = get_scheduler(
        name,
        throwaway,
        num_warmup_steps=math.ceil(warmup_ratio * num_steps),
        num_training_steps=num_steps,
        scheduler_specific_kwargs=kwargs,
    )
    return schedule.lr_lambdas[0]
