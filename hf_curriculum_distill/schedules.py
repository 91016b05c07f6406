"""The learning-rate schedules of transformers as functions of the step and the layer, with nothing to save."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from hf_curriculum_distill.stages import StageScheduler, finished_layer


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


def slowed_schedule(
    factor: Callable[[int], float], stages: StageScheduler, layer: int, finished_layer_rate: float
) -> Callable[[int], float]:
    """A schedule of one layer's parameters, which is slower in the layer stages after those that have matched it.

    Args:
        factor: the schedule of all others.
        stages: say where a layer is finished: see [`~stages.finished_layer`].
        layer: a block's number; 0 for all other parameters, of which layer stages train those before the blocks.
        finished_layer_rate: what multiplies `factor` there.
    """
    finished = [finished_layer(stages.stages, index) for index in range(len(stages.stages))]
    shares = [1.0 if highest is None or layer > highest else finished_layer_rate for highest in finished]
    return lambda step: factor(step) * shares[stages.index_at(step)]


def split_groups_by_layer(optimizer: torch.optim.Optimizer, layers: Mapping[nn.Parameter, int]) -> list[int]:
    """Split each of an optimizer's parameter groups, in place, into one for each layer.

    Args:
        layers: the layer of each parameter, 0 if it has none.

    Returns:
        the layer of each group, the highest first: the learning rate of the first group is logged.
    """
    groups = []
    for group in optimizer.param_groups:
        of_layers: dict[int, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            of_layers.setdefault(layers.get(parameter, 0), []).append(parameter)
        groups += [(layer, group | {"params": parameters}) for layer, parameters in of_layers.items()]
    groups.sort(key=lambda one: -one[0])
    optimizer.param_groups[:] = [group for _, group in groups]
    return [layer for layer, _ in groups]
