"""Which of the student's layers a stage no longer trains, or trains more slowly."""

from __future__ import annotations

from collections.abc import Sequence

from hf_curriculum_distill.stages.stage import Stage


def finished_layer(stages: Sequence[Stage], index: int) -> int | None:
    """The student's highest layer that earlier stages matched, below those that layer stage `index` matches.

    Args:
        stages: all stages, in order.
        index: the number of one of them, from 0.

    Returns:
        the layer (0: the embeddings); None where there is none, and in a stage that needs logits.

    ```python
    >>> stages = [Stage(hidden=[(1, 2)], until=0.3), Stage(hidden=[(2, 4)], until=0.6), Stage(kl_weight=1.0)]
    >>> [finished_layer(stages, index) for index in range(3)]
    [None, 1, None]

    ```
    """
    stage = stages[index]
    if stage.needs_logits:
        return None
    return max((layer for layer in _matched(stages[:index]) if layer < max(stage.student_layers)), default=None)


def frozen_layer(
    stages: Sequence[Stage],
    index: int,
    train_prefix: str = "joint",
    freeze_matched_layers: bool = False,
    freeze_embeddings_in_layer_stages: bool = False,
) -> int | None:
    """The student's highest layer that gets no gradient in stage `index`; all layers below get none, either.

    Args:
        stages: all stages, in order.
        index: the number of one of them, from 0.
        train_prefix, freeze_matched_layers, freeze_embeddings_in_layer_stages: as in
            [`CurriculumDistillationConfig`].

    Returns:
        the layer (0: the embeddings); None where nothing is frozen.

    ```python
    >>> stages = [Stage(hidden=[(1, 2)], until=0.3), Stage(hidden=[(2, 4)], until=0.6), Stage(kl_weight=1.0)]
    >>> [frozen_layer(stages, index, train_prefix="block") for index in range(3)]
    [None, 1, None]
    >>> [frozen_layer(stages, index, freeze_embeddings_in_layer_stages=True) for index in range(3)]
    [0, 0, None]

    ```
    """
    if stages[index].needs_logits:
        return max(_matched(stages[:index]), default=None) if freeze_matched_layers else None
    finished = finished_layer(stages, index) if train_prefix == "block" else None
    return 0 if finished is None and freeze_embeddings_in_layer_stages else finished


def _matched(stages: Sequence[Stage]) -> list[int]:
    return [max(stage.student_layers) for stage in stages if stage.hidden]
