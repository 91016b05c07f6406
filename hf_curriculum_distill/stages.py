"""Which losses are trained when: stages, the map from optimizer step to stage, what a stage freezes. Pure Python."""

from __future__ import annotations

import dataclasses
import itertools
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LayerPair = tuple[int, int]

LAYER_ORDERS = ("sequential", "cumulative", "together", "last")


@dataclass(frozen=True)
class Stage:
    """A weighted sum of loss terms, trained until a step.

    Args:
        hidden: `(student_layer, teacher_layer)` pairs whose hidden states are matched. Layers are block numbers
            from 1 (`i` is the raw output of block `i`, before any final norm); 0 is the embeddings, the input of
            block 1.
        hidden_weight: weight of the hidden loss, a mean over pairs.
        kl_weight: weight of the divergence between the teacher's and the student's logits.
        label_weight: weight of the cross-entropy on the labels.
        until: where the stage ends: an int is the number of optimizer steps after which the next stage begins, a
            float below 1 is that number as a fraction of `max_steps`. The last stage has none.

    Raises:
        ValueError: the stage matches nothing, a weight is negative or not finite, a student layer occurs twice, or
            `until` is out of range.
    """

    hidden: tuple[LayerPair, ...] = ()
    hidden_weight: float = 1.0
    kl_weight: float = 0.0
    label_weight: float = 0.0
    until: int | float | None = None

    def __post_init__(self):
        object.__setattr__(self, "hidden", parse_layer_pairs(self.hidden))
        for name in ("hidden_weight", "kl_weight", "label_weight"):
            weight = getattr(self, name)
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if not (number and math.isfinite(weight) and weight >= 0):
                raise ValueError(f"Stage.{name} is {weight!r}; a loss weight must be a finite number, at least 0.")
        if not ((self.hidden and self.hidden_weight) or self.kl_weight or self.label_weight):
            raise ValueError(
                "A stage needs a loss: give it layer pairs in `hidden`, or a positive `kl_weight` or `label_weight`."
            )
        if isinstance(self.until, bool) or not isinstance(self.until, (int, float, type(None))):
            raise ValueError(f"Stage.until is {self.until!r}; it must be a number of steps or a fraction of max_steps.")
        if isinstance(self.until, float) and not 0 < self.until < 1:
            raise ValueError(
                f"Stage.until is {self.until}; a float is a fraction of max_steps strictly between 0 and 1. "
                "Write a number of optimizer steps as an int."
            )
        if isinstance(self.until, int) and self.until < 1:
            raise ValueError(f"Stage.until is {self.until}; a stage must last at least one optimizer step.")

    @property
    def needs_logits(self) -> bool:
        """Whether a term needs the student's logits; else only the blocks up to the highest pair run."""
        return bool(self.kl_weight or self.label_weight)

    @property
    def needs_teacher(self) -> bool:
        """Whether a term needs the teacher's hidden states or logits."""
        return bool(self.hidden or self.kl_weight)

    @property
    def student_layers(self) -> tuple[int, ...]:
        """The student's layers in the order of `hidden`."""
        return tuple(student for student, _ in self.hidden)

    @property
    def teacher_layers(self) -> tuple[int, ...]:
        """The teacher's layers in increasing order, each once."""
        return tuple(sorted({teacher for _, teacher in self.hidden}))

    @property
    def name(self) -> str:
        """What the stage matches: `layer 3`, `layers 1-4`, `kl`, `kl + layer 12`, `kl + labels`."""
        parts = (["kl"] if self.kl_weight else []) + (["labels"] if self.label_weight else [])
        return " + ".join(parts + ([_name_layers(self.student_layers)] if self.hidden else []))


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

    def index_at(self, step: int) -> int:
        """The number, from 0, of the stage that trains next after `step` completed optimizer steps."""
        return bisect_right(self.boundaries, step)

    def stage_at(self, step: int) -> Stage:
        """The stage that trains next after `step` completed optimizer steps."""
        return self.stages[self.index_at(step)]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Of each stage: see [`span`]."""
        return [self.span(index) for index in range(len(self.stages))]

    def span(self, index: int) -> tuple[int, int]:
        """How many optimizer steps are completed when stage `index` begins, and when it ends."""
        edges = (0, *self.boundaries, self.max_steps)
        return edges[index], edges[index + 1]


def parse_layer_pairs(pairs: Iterable[Iterable[int]]) -> tuple[LayerPair, ...]:
    """Check `[[student_layer, teacher_layer], ...]` and return it as tuples.

    Raises:
        ValueError: it is no list of pairs of block numbers, or names a student layer twice.
    """
    parsed: list[LayerPair] = []
    if not isinstance(pairs, Iterable):
        raise ValueError(f"{pairs!r} is no list of layer pairs; write [[student_layer, teacher_layer], ...].")
    for pair in pairs:
        pair = tuple(pair) if isinstance(pair, Iterable) and not isinstance(pair, str) else (pair,)
        if len(pair) != 2 or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in pair):
            raise ValueError(
                f"{list(pair)!r} is not a layer pair; write [student_layer, teacher_layer] with block numbers from 1 "
                "(0 is the embeddings)."
            )
        parsed.append(pair)
    students = [student for student, _ in parsed]
    if len(set(students)) != len(students):
        raise ValueError(f"The layer pairs {parsed} name a student layer twice; each has one target.")
    return tuple(parsed)


def parse_stages(stages: Any) -> list[dict[str, Any]]:
    """Check a list of stages, or of dicts of their fields, and return the fields as plain JSON values.

    Raises:
        ValueError: it is no such list, a field is unknown, or a stage is refused; the message has the stage's number.
    """
    if not isinstance(stages, (list, tuple)):
        raise ValueError(f"stages is {stages!r}; write a list with a dict of Stage fields for each stage.")
    return [_stage_fields(stage, index) for index, stage in enumerate(stages)]


def _stage_fields(stage: Any, index: int) -> dict[str, Any]:
    stage = dataclasses.asdict(stage) if isinstance(stage, Stage) else stage
    if not isinstance(stage, dict):
        raise ValueError(f"stages[{index}] is {stage!r}; write each stage as a dict of Stage fields.")
    known = [f.name for f in dataclasses.fields(Stage)]
    if unknown := sorted(set(stage) - set(known), key=str):
        raise ValueError(f"stages[{index}] has unknown fields {unknown}; a stage has {', '.join(known)}.")
    try:
        fields = dataclasses.asdict(Stage(**stage))
    except ValueError as error:
        raise ValueError(f"stages[{index}]: {error}") from error
    return fields | {"hidden": [list(pair) for pair in fields["hidden"]]}


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


def curriculum_stages(
    pairs: Sequence[LayerPair],
    layer_order: str,
    layer_stage_fraction: float,
    hidden_weight: float,
    logit_stage: Mapping[str, float],
) -> list[Stage]:
    """Layer stages of equal length, then the logit stage: the curriculum of Gupta & Karmalkar (2025, arXiv 2503.17494).

    `layer_order="sequential"` is theirs; the other orders, and how long the stages are, are our choice.

    Args:
        pairs: the layers to match, in increasing order.
        layer_order: one of `LAYER_ORDERS`.
        layer_stage_fraction: the fraction of `max_steps` that all layer stages have together.
        hidden_weight: of the layer stages.
        logit_stage: the weights of the last stage; a positive `hidden_weight` among them keeps the pairs of the last
            layer stage as an auxiliary term.

    ```python
    >>> [s.name for s in curriculum_stages([(1, 2), (2, 4)], "cumulative", 0.5, 1.0, {"kl_weight": 1.0})]
    ['layer 1', 'layers 1-2', 'kl']

    ```
    """
    groups = {
        "sequential": [(pair,) for pair in pairs],
        "cumulative": [tuple(pairs[: i + 1]) for i in range(len(pairs))],
        "together": [tuple(pairs)],
        "last": [tuple(pairs[-1:])],
    }[layer_order]
    layers = [
        Stage(hidden=group, hidden_weight=hidden_weight, until=layer_stage_fraction * (i + 1) / len(groups))
        for i, group in enumerate(groups)
    ]
    return [*layers, Stage(hidden=groups[-1] if logit_stage.get("hidden_weight") else (), **logit_stage)]


def num_frozen_layers(
    stages: Sequence[Stage], index: int, train_prefix: str = "joint", freeze_matched_layers: bool = False
) -> int:
    """How many of the student's first blocks, embeddings included, get no gradient in stage `index`.

    Args:
        stages: all stages, in order.
        index: the number of one of them, from 0.
        train_prefix, freeze_matched_layers: as in [`CurriculumDistillationConfig`].

    Returns:
        the number of the highest frozen block; 0 where nothing is frozen.

    ```python
    >>> stages = [Stage(hidden=[(1, 2)], until=0.3), Stage(hidden=[(2, 4)], until=0.6), Stage(kl_weight=1.0)]
    >>> [num_frozen_layers(stages, index, train_prefix="block") for index in range(3)]
    [0, 1, 0]

    ```
    """
    stage, matched = stages[index], [max(s.student_layers) for s in stages[:index] if s.hidden]
    if stage.needs_logits:
        return max(matched, default=0) if freeze_matched_layers else 0
    if train_prefix == "joint":
        return 0
    return max((layer for layer in matched if layer < max(stage.student_layers)), default=0)


def _name_layers(layers: Sequence[int]) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]}-{layers[-1]}"
    return "layers " + ", ".join(map(str, layers))
