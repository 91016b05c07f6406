"""Which layers are matched, and the stages that match them in a curriculum."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from hf_curriculum_distill.stages.stage import LayerPair, Stage, parse_layer_pairs

LAYER_ORDERS = ("sequential", "cumulative", "together", "last", "complexity")

# The curriculum as it was published (Gupta & Karmalkar, 2025, arXiv 2503.17494):
# `CurriculumDistillationConfig("out", **CURRICULUM_EXTRACTION)`. How long the stages are is not public.
CURRICULUM_EXTRACTION: dict[str, Any] = {
    "method": "curriculum",
    "layer_order": "sequential",
    "hidden_weight_in_logit_stage": 0.0,
    "layer_stage_fraction": 0.5,
    "projection": "gaussian",
    "shared_projection": False,
}


def resolve_layer_map(
    layer_map: str | Iterable[Iterable[int]], num_layers: int | None, student_depth: int, teacher_depth: int
) -> tuple[LayerPair, ...]:
    """Turn a named layer map, or explicit pairs, into increasing `(student_layer, teacher_layer)` pairs.

    `"uniform"` takes `num_layers` evenly spaced student layers and maps student layer `i` to teacher layer
    `ceil(i * teacher_depth / student_depth)`: the same layer at equal depth, and always the last to the last. `"last"`
    maps the last `num_layers` blocks of the student to those of the teacher. Both maps are our choice.

    Args:
        layer_map: `"uniform"`, `"last"` or `[[student_layer, teacher_layer], ...]`.
        num_layers: how many student layers are matched; None for as many as there can be.
        student_depth, teacher_depth: the number of blocks.

    Raises:
        ValueError: the name is unknown, `num_layers` is out of range, or the map does not increase.

    ```python
    >>> resolve_layer_map("uniform", 2, student_depth=4, teacher_depth=6)
    ((2, 3), (4, 6))
    >>> resolve_layer_map("last", 2, student_depth=4, teacher_depth=6)
    ((3, 5), (4, 6))

    ```
    """
    if isinstance(layer_map, str):
        limit = student_depth if layer_map == "uniform" else min(student_depth, teacher_depth)
        count = limit if num_layers is None else num_layers
        if not 1 <= count <= limit:
            raise ValueError(
                f"num_layer_stages is {count}, but layer_map={layer_map!r} has between 1 and {limit} layers to match "
                f"(student: {student_depth} blocks, teacher: {teacher_depth})."
            )
        if layer_map == "uniform":
            students = [-(-j * student_depth // count) for j in range(1, count + 1)]
            return tuple((i, -(-i * teacher_depth // student_depth)) for i in students)
        if layer_map == "last":
            return tuple((student_depth - count + j, teacher_depth - count + j) for j in range(1, count + 1))
        raise ValueError(f"layer_map is {layer_map!r}; use 'uniform', 'last' or [[student_layer, teacher_layer], ...].")
    pairs = parse_layer_pairs(layer_map)
    if not pairs:
        raise ValueError("layer_map is an empty list; name at least one [student_layer, teacher_layer] pair.")
    if num_layers is not None and num_layers != len(pairs):
        raise ValueError(f"num_layer_stages is {num_layers} but layer_map has {len(pairs)} pairs; leave one out.")
    for (lower_s, lower_t), (upper_s, upper_t) in itertools.pairwise(pairs):
        if upper_s <= lower_s or upper_t < lower_t:
            raise ValueError(
                f"layer_map has ({lower_s}, {lower_t}) before ({upper_s}, {upper_t}); a layer map must increase. "
                "Give explicit `stages` to train layers in another order."
            )
    return pairs


def matched_pairs(stages: Sequence[Stage]) -> list[LayerPair]:
    """List the layer pairs that stages match.

    Args:
        stages: in any order.

    Returns:
        `(student layer, teacher layer)`, each once, in the order in which stages first match them.

    ```python
    >>> matched_pairs([Stage(hidden=[(1, 2)]), Stage(hidden=[(2, 4), (1, 2)])])
    [(1, 2), (2, 4)]

    ```
    """
    return list(dict.fromkeys(pair for stage in stages for pair in stage.hidden))


def check_layer_range(pairs: Iterable[LayerPair], student_depth: int, teacher_depth: int) -> None:
    """Raise a `ValueError` for a layer that a model of this number of blocks does not have."""
    for student, teacher in pairs:
        for who, layer, depth in (("student", student, student_depth), ("teacher", teacher, teacher_depth)):
            if layer > depth:
                raise ValueError(
                    f"Layer pair ({student}, {teacher}) names {who} layer {layer}, but the {who} has {depth} blocks "
                    f"(numbered 1 to {depth}; 0 is the embeddings)."
                )


def check_stage_depths(stages: Iterable[Stage], student_depth: int, teacher_depth: int | None) -> None:
    """Raise a `ValueError` for a stage that needs a teacher where there is none, or a layer that a model lacks.

    Args:
        stages: in order.
        student_depth, teacher_depth: the number of blocks; None without a teacher.
    """
    for index, stage in enumerate(stages):
        if stage.needs_teacher and teacher_depth is None:
            raise ValueError(
                f"stages[{index}] ({stage.name}) matches a teacher, but no teacher_model was given; pass one, or use "
                "only label_weight."
            )
        check_layer_range(stage.hidden, student_depth, teacher_depth or 0)


def rising_groups(measured: Mapping[LayerPair, Sequence[float]]) -> list[tuple[LayerPair, ...]]:
    """Which layers to match together, the easiest first, by how complex each one's targets are for the student.

    Layers that are easier than random targets in every draw are sorted by their mean; of two neighbours that not every
    draw sorts alike, the harder one joins the easier one's group. What is fitted of targets as hard as random ones says
    nothing of other examples, so that such layers are left out.

    Args:
        measured: by pair, its complexity in each draw of examples, as a share of random targets': see
            [`~hf_curriculum_distill.complexity.relative_complexity`]. Every draw is of all layers.

    Returns:
        the groups, which may be none; the pairs of each in increasing order.

    ```python
    >>> rising_groups({(1, 2): [0.5, 0.6], (2, 4): [0.2, 0.3], (3, 6): [0.4, 0.7], (4, 8): [0.9, 1.1]})
    [((2, 4),), ((1, 2), (3, 6))]

    ```
    """
    easier_than_random = [pair for pair in sorted(measured) if max(measured[pair]) < 1]
    groups: list[list[LayerPair]] = []
    before: Sequence[float] = ()
    for pair in sorted(easier_than_random, key=lambda pair: fmean(measured[pair])):
        if not groups or all(a < b for a, b in zip(before, measured[pair], strict=True)):
            groups.append([])
        groups[-1].append(pair)
        before = measured[pair]
    return [tuple(sorted(group)) for group in groups]


def curriculum_stages(
    pairs: Sequence[LayerPair],
    layer_order: str,
    layer_stage_fraction: float,
    hidden_weight: float,
    logit_stage: Mapping[str, float | None] | None,
    groups: Sequence[tuple[LayerPair, ...]] | None = None,
) -> list[Stage]:
    """Layer stages of equal length, then the logit stage: the curriculum of Gupta & Karmalkar (2025, arXiv 2503.17494).

    `layer_order="sequential"` is theirs; the other orders, and how long the stages are, are our choice.

    Args:
        pairs: the layers to match, in increasing order.
        layer_order: one of `LAYER_ORDERS`.
        layer_stage_fraction: the fraction of `max_steps` that all layer stages have together; 1 without a logit stage,
            and with 0 there are none.
        hidden_weight: of the layer stages.
        logit_stage: the weights of the last stage; a positive `hidden_weight` or `hidden_weight_at_end` among them
            keeps the pairs of the last layer stage as an auxiliary term. None for no logit stage.
        groups: the pairs of each layer stage, for "complexity": see [`rising_groups`]. Until they are known, as many
            stages as there can be: one for each pair, lowest first.

    ```python
    >>> [s.name for s in curriculum_stages([(1, 2), (2, 4)], "cumulative", 0.5, 1.0, {"kl_weight": 1.0})]
    ['layer 1', 'layers 1-2', 'kl']

    ```
    """
    one_by_one = [(pair,) for pair in pairs]
    groups = {
        "sequential": one_by_one,
        "cumulative": [tuple(pairs[: i + 1]) for i in range(len(pairs))],
        "together": [tuple(pairs)],
        "last": [tuple(pairs[-1:])],
        "complexity": groups or one_by_one,
    }[layer_order]
    ends = [layer_stage_fraction * (i + 1) / len(groups) for i in range(len(groups))]
    if logit_stage is None:
        ends[-1] = None  # the last stage ends with training
    stages = zip(groups, ends, strict=True) if layer_stage_fraction else ()
    layers = [Stage(hidden=group, hidden_weight=hidden_weight, until=end) for group, end in stages]
    if logit_stage is None:
        return layers
    keeps_hidden = logit_stage.get("hidden_weight") or logit_stage.get("hidden_weight_at_end")
    return [*layers, Stage(hidden=groups[-1] if keeps_hidden else (), **logit_stage)]
