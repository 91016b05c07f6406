"""The learning-rate schedules of transformers as functions of the step, with nothing to save."""

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
    """A schedule that begins again with each stage: transformers' schedule `name`, with its own warm-up.

    Args:
        stages: where stages begin and end.
        name, kwargs: `TrainingArguments.lr_scheduler_type` and `lr_scheduler_kwargs`.
        learning_rate: the peak, for schedules with absolute learning rates among their `kwargs`.
        warmup_ratio: the fraction of each stage that is warm-up, rounded up to optimizer steps.

    Returns:
        a function from the number of completed optimizer steps to the factor of the learning rate.
    """
    spans = stages.spans
    factors = [
        schedule_factor(name, end - start, learning_rate, math.ceil(warmup_ratio * (end - start)), kwargs)
        for start, end in spans
    ]

    def factor(step: int) -> float:
        index = stages.index_at(min(step, stages.max_steps - 1))  # Trainer computes one for the step after the last
        return factors[index](step - spans[index][0])

    return factor


def schedule_factor(
    name: str, num_steps: int, learning_rate: float, num_warmup_steps: int, kwargs: dict[str, Any]
) -> Callable[[int], float]:
    """transformers' schedule `name` over `num_steps` optimizer steps.

    Arguments and result as of [`restarted_schedule`], with the warm-up in steps.
    """
    throwaway = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=learning_rate)
    schedule = get_scheduler(
        name,
        throwaway,
        num_warmup_steps=num_warmup_steps,
        num_training_steps=num_steps,
        scheduler_specific_kwargs=kwargs,
    )
    return schedule.lr_lambdas[0]
