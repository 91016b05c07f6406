"""[`StageScheduler`]: which stage trains an optimizer step."""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Sequence

from hf_curriculum_distill.stages.stage import Stage


class StageScheduler:
    """Which [`Stage`] trains an optimizer step: a pure function of the step, with nothing to save.

    Args:
        stages: in the order in which they train.
        max_steps: the number of optimizer steps of the whole training.

    Attributes:
        stages: the same, with every `until` as a number of optimizer steps.
        boundaries: the `until` of all stages but the last.

    ```python
    >>> scheduler = StageScheduler([Stage(hidden=[[1, 2]], until=0.5), Stage(kl_weight=1.0)], max_steps=10)
    >>> scheduler.boundaries
    (5,)
    >>> [scheduler.stage_at(step).name for step in (0, 4, 5, 9)]
    ['layer 1', 'layer 1', 'kl', 'kl']
    >>> annealed = Stage(hidden=[[1, 2]], kl_weight=1.0, hidden_weight_at_end=0.0)
    >>> [StageScheduler([annealed], max_steps=4).stage_at(step).hidden_weight for step in range(4)]
    [1.0, 0.75, 0.5, 0.25]

    ```

    Raises:
        ValueError: no stage, `max_steps` not positive, a stage before the last without `until`, a last stage with
            one, or boundaries that do not increase towards `max_steps`.
    """

    def __init__(self, stages: Sequence[Stage], max_steps: int):
        if max_steps < 1:
            raise ValueError(f"max_steps is {max_steps}; the stages are fractions of it, so it must be positive.")
        if not stages:
            raise ValueError("The list of stages is empty; give at least one stage.")
        if stages[-1].until is not None:
            raise ValueError(
                f"The last stage has until={stages[-1].until}, but it always ends with training. Leave its `until` out."
            )
        ends: list[int] = []
        for index, stage in enumerate(stages[:-1]):
            if stage.until is None:
                raise ValueError(f"stages[{index}].until is missing; only the last stage may leave it out.")
            end = round(stage.until * max_steps) if isinstance(stage.until, float) else stage.until
            previous = ends[-1] if ends else 0
            if end <= previous:
                before = f"stages[{index - 1}] ends at {previous}" if ends else "training starts at 0"
                raise ValueError(
                    f"stages[{index}].until is {stage.until} (step {end} of {max_steps}) but {before}; boundaries must "
                    "increase by at least one step. Order the stages, use fewer of them, or raise max_steps."
                )
            if end >= max_steps:
                raise ValueError(
                    f"stages[{index}].until is {stage.until} (step {end}) but max_steps is {max_steps}, which leaves "
                    "nothing to the stages after it. Lower `until` or raise max_steps."
                )
            ends.append(end)
        self.max_steps = max_steps
        self.boundaries = tuple(ends)
        self.stages = tuple(dataclasses.replace(s, until=e) for s, e in zip(stages, (*ends, None), strict=True))

    def __repr__(self) -> str:
        return f"StageScheduler({list(self.stages)}, max_steps={self.max_steps})"

    def index_at(self, step: int) -> int:
        """The number, from 0, of the stage that trains next after `step` completed optimizer steps."""
        return bisect_right(self.boundaries, step)

    def stage_at(self, step: int) -> Stage:
        """The stage that trains next after `step` completed optimizer steps, with the weights of that step."""
        index = self.index_at(step)
        stage = self.stages[index]
        if stage.hidden_weight_at_end is None:
            return stage
        first, end = self.span(index)
        share = min(1.0, (step - first) / (end - first))
        weight = (1 - share) * stage.hidden_weight + share * stage.hidden_weight_at_end
        return dataclasses.replace(stage, hidden_weight=weight)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Of each stage: see [`span`]."""
        return [self.span(index) for index in range(len(self.stages))]

    def span(self, index: int) -> tuple[int, int]:
        """How many optimizer steps are completed when stage `index` begins, and when it ends."""
        edges = (0, *self.boundaries, self.max_steps)
        return edges[index], edges[index + 1]
