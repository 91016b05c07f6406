"""[`Stage`]: which losses are trained, until when; and its fields as plain values. Pure Python."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

LayerPair = tuple[int, int]


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
        hidden_weight_at_end: the hidden weight at the end of the stage, towards which it changes linearly with the
            steps, as a learning rate does; None where it stays the same.

    Raises:
        ValueError: the stage matches nothing, a weight is negative or not finite, a student layer occurs twice, or
            `until` is out of range.
    """

    hidden: tuple[LayerPair, ...] = ()
    hidden_weight: float = 1.0
    kl_weight: float = 0.0
    label_weight: float = 0.0
    until: int | float | None = None
    hidden_weight_at_end: float | None = None

    def __post_init__(self):
        object.__setattr__(self, "hidden", parse_layer_pairs(self.hidden))
        changes = self.hidden_weight_at_end is not None
        for name in ("hidden_weight", "kl_weight", "label_weight", *["hidden_weight_at_end"] * changes):
            weight = getattr(self, name)
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if not (number and math.isfinite(weight) and weight >= 0):
                raise ValueError(f"Stage.{name} is {weight!r}; a loss weight must be a finite number, at least 0.")
        if changes and not self.hidden:
            raise ValueError(
                f"Stage.hidden_weight_at_end is {self.hidden_weight_at_end!r}, but `hidden` has no layer pairs whose "
                "weight could change; name some, or leave it out."
            )
        hidden_weight = self.hidden_weight or self.hidden_weight_at_end
        if not ((self.hidden and hidden_weight) or self.kl_weight or self.label_weight):
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

    def __repr__(self) -> str:
        """What differs from the defaults, as Python."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        given = {f.name: given[f.name] for f in dataclasses.fields(self) if given[f.name] != f.default}
        return f"Stage({', '.join(f'{name}={value!r}' for name, value in given.items())})"

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


def _name_layers(layers: Sequence[int]) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]}-{layers[-1]}"
    return "layers " + ", ".join(map(str, layers))
