"""How complex what a student learns from is for it: labels, a teacher's logits, its projected hidden states."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_curriculum_distill.complexity.kernel import empirical_ntk, hidden_states, logit_contrasts
from hf_curriculum_distill.complexity.supervision import (
    SupervisionComplexity,
    relative_complexity,
    supervision_complexity,
)

if TYPE_CHECKING:
    from hf_curriculum_distill.batches.batch import Batch
    from hf_curriculum_distill.stages import Stage
    from hf_curriculum_distill.teachers.teacher import Targets, Teacher


def class_targets(probabilities: Tensor) -> Tensor:
    """Probabilities of classes as targets of a kernel: centred, and scaled so that labels have a mean square of 1.

    `(p - 1 / classes) classes / sqrt(classes - 1)`: of two classes, a label is +1 and -1. Labels that are drawn at
    random, each class as likely, have a mean squared [`supervision_complexity`] of at least `1 / (1 + ridge)` for a
    kernel that all classes share, and for one for each class.

    Args:
        probabilities: `[n, classes]`.

    ```python
    >>> class_targets(torch.tensor([[1.0, 0.0], [0.25, 0.75]]))
    tensor([[ 1.0000, -1.0000],
            [-0.5000,  0.5000]], dtype=torch.float64)

    ```
    """
    classes = probabilities.shape[-1]
    return (probabilities.double() - 1 / classes) * classes / math.sqrt(classes - 1)


def measure_complexity(
    batch: Batch,
    teacher: Teacher,
    stage: Stage,
    temperature: float = 1.0,
    max_rows: int = 512,
    num_directions: int = 16,
    seed: int = 0,
) -> dict[str, SupervisionComplexity]:
    """The adjusted supervision complexity, for the batch's student, of all that it could learn from this batch.

    All targets of one kind of output are measured with one kernel, the mean over outputs ("trace" of
    [`empirical_ntk`]), estimated from random directions among the outputs if they are many. Probabilities are scaled by
    [`class_targets`]; projected hidden states are standardised by their bank. Numbers of logits and of hidden states
    belong to different kernels and are adjusted, so that both may be compared with 1, what random targets cost at
    least.

    Args:
        batch: held-out examples, with whole logits (`BatchReader(...)(inputs, whole_logits=True)`).
        teacher: prepared with the projection bank of the stage's layers, if it has any.
        stage: its layer pairs are measured, and, if it needs logits, the labels and the teacher's probabilities.
        temperature: of the teacher's probabilities.
        max_rows: the largest number of rows of a kernel; more are drawn from at random.
        num_directions: the largest number of outputs whose gradients are computed; of more outputs, this many random
            directions of +1 and -1 are.
        seed: of random labels, rows and directions.

    Returns:
        by name: "labels" (if the batch has them), "random labels", "teacher", and "layer 1" and so on, by the student's
        layers.

    Raises:
        ValueError: the student predicts numbers; see also [`empirical_ntk`] and [`supervision_complexity`].
        FloatingPointError: gradients are not finite.
    """
    found = {"teacher": teacher.targets(batch, stage)}
    drawn = Drawn(max_rows, num_directions, seed)
    return measure_targets(batch, found, stage, teacher.partial_forward.stack, temperature, drawn)


class Drawn(NamedTuple):
    """How many rows and outputs a kernel has, which are drawn at random: see [`measure_complexity`]."""

    max_rows: int = 512
    num_directions: int = 16
    seed: int = 0


DRAWN = Drawn()


def measure_targets(
    batch: Batch,
    teachers: Mapping[str, Targets],
    stage: Stage,
    stack: str = "encoder",
    temperature: float = 1.0,
    drawn: Drawn = DRAWN,
) -> dict[str, SupervisionComplexity]:
    """As [`measure_complexity`], of the targets of several teachers, with one kernel for all their logits.

    Args:
        batch, stage, temperature: as there.
        teachers: by name, their targets on the batch; the first one's hidden states are measured.
        stack: whose blocks are matched in an encoder-decoder.
        drawn: what is drawn at random.

    Returns:
        as there, with the teachers' names in place of "teacher".
    """
    max_rows, num_directions, seed = drawn
    draw = torch.Generator().manual_seed(seed)
    targets, model = next(iter(teachers.values())), batch.model
    measured = {}
    if stage.needs_logits:
        if batch.head.predicts_numbers:
            raise ValueError(f"{type(model).__name__} predicts numbers; complexity is measured of class probabilities.")
        given = {name: of_teacher.logits[:].double() for name, of_teacher in teachers.items()}
        count, classes = next(iter(given.values())).shape
        chosen = _draw_rows(torch.arange(count), max_rows, draw)
        rows = chosen if batch.rows is None else batch.rows.cpu()[chosen]
        directions = _draw_directions(classes, num_directions, draw)
        kernel = empirical_ntk(model, batch.student_inputs, "trace", logit_contrasts(directions), rows)
        if batch.labels is not None:
            labels = F.one_hot(batch.labels.cpu()[chosen], classes)
            measured["labels"] = supervision_complexity(kernel, class_targets(labels))
        labels = F.one_hot(torch.randint(classes, (len(chosen),), generator=draw), classes)
        measured["random labels"] = supervision_complexity(kernel, class_targets(labels))
        for name, logits in given.items():
            probabilities = (logits[chosen.to(logits.device)] / temperature).softmax(-1)
            measured[name] = supervision_complexity(kernel, class_targets(probabilities))
    for layer, hidden in targets.hidden.items():
        kernel, of_rows = _kernel_of_layer(batch, layer, hidden, stack, drawn, draw)
        measured[f"layer {layer}"] = supervision_complexity(kernel, of_rows)
    return measured


def compare_layers(
    batch: Batch, hidden: Mapping[int, Tensor], stack: str = "encoder", drawn: Drawn = DRAWN
) -> dict[int, float]:
    """The [`relative_complexity`] of each layer's targets for the batch's student, of the same rows for all layers.

    Args:
        batch: examples.
        hidden: by student layer, its targets on the batch, `[batch, length, student_dim]`.
        stack: whose blocks are matched in an encoder-decoder.
        drawn: how many rows and outputs the kernels have, which are drawn at random.

    Returns:
        by student layer.

    Raises:
        ValueError, FloatingPointError: see [`empirical_ntk`] and [`supervision_complexity`].
    """
    measured = {}
    for layer, of_layer in hidden.items():
        draw = torch.Generator().manual_seed(drawn.seed)
        measured[layer] = relative_complexity(*_kernel_of_layer(batch, layer, of_layer, stack, drawn, draw))
    return measured


def _kernel_of_layer(
    batch: Batch, layer: int, hidden: Tensor, stack: str, drawn: Drawn, draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The kernel of some rows of a layer's states, and their targets."""
    counted = batch.weights(hidden).flatten().nonzero().flatten().cpu()
    rows = _draw_rows(counted, drawn.max_rows, draw)
    directions = _draw_directions(hidden.shape[-1], drawn.num_directions, draw)
    kernel = empirical_ntk(batch.model, batch.student_inputs, "trace", hidden_states(layer, directions, stack), rows)
    return kernel, hidden.flatten(0, 1)[rows.to(hidden.device)]


def _draw_rows(rows: Tensor, number: int, draw: torch.Generator) -> Tensor:
    """`number` of the rows at random, or all, in increasing order."""
    return rows[torch.randperm(len(rows), generator=draw)[:number].sort().values]


def _draw_directions(size: int, number: int, draw: torch.Generator) -> Tensor:
    """Random directions `[size, number]`, whose mean kernel is on average that of all outputs; or each output."""
    if size <= number:
        return torch.eye(size)
    signs = torch.randint(2, (size, number), generator=draw) * 2.0 - 1
    return signs / math.sqrt(size)
