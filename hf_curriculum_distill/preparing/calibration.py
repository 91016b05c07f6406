"""What is made and measured before the first step: the projection bank, and samples of the training data."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from hf_curriculum_distill.batches.batch import Batch, BatchReader
from hf_curriculum_distill.batches.checks import check_batch, naming_batch
from hf_curriculum_distill.complexity.analysis import Drawn, compare_layers
from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.layers.forward import PartialForward
from hf_curriculum_distill.projections import ProjectionBank
from hf_curriculum_distill.stages import LayerPair, Stage, matched_pairs, parse_layer_pairs
from hf_curriculum_distill.teachers.teacher import Teacher

# How layers are compared: the number of draws, by whose spread layers are equally hard, and the most examples of each.
NUM_DRAWS, DRAWN_EXAMPLES = 4, 32
_DRAWS = [Drawn(max_rows=128, num_directions=1, seed=seed) for seed in range(NUM_DRAWS)]


def projected_pairs(
    stages: Sequence[Stage], args: CurriculumDistillationConfig, student: PartialForward, teacher: PartialForward
) -> tuple[LayerPair, ...]:
    """The layer pairs of a bank: those that stages match.

    If there are none, embeddings of another width are projected by a matrix that is named after the last layers.
    """
    pairs = parse_layer_pairs(matched_pairs(stages))
    if args.pooling is not None and not pairs and student.hidden_size != teacher.hidden_size:
        return ((student.depth, teacher.depth),)
    return pairs


def make_bank(
    pairs: Sequence[LayerPair], student_dim: int, teacher_dim: int, args: CurriculumDistillationConfig
) -> ProjectionBank:
    """A bank of one matrix `[student_dim, teacher_dim]` for each pair, as `args` say."""
    return ProjectionBank.create(
        pairs,
        [student_dim] * len(pairs),
        [teacher_dim] * len(pairs),
        kind=args.projection,
        seed=args.projection_seed,
        shared=args.shared_projection,
    )


def bank_settings(args: CurriculumDistillationConfig) -> tuple[Any, ...]:
    """The arguments that a bank, measured, depends on."""
    drawn = args.projection, args.projection_seed, args.shared_projection
    return *drawn, args.standardize_targets, args.calibration_samples, args.hidden_positions, args.layer_stack


def sample(data: Any, number: int, generator: random.Random | Any = random) -> list[Any]:
    """`number` examples at random, or all; of a stream the first."""
    if not hasattr(data, "__len__"):
        return list(itertools.islice(data, number))
    return [data[index] for index in generator.sample(range(len(data)), min(number, len(data)))]


def checked(
    loader: Iterable[Any], read: BatchReader, to_device: Callable[[Any], Any], needs_logits: bool
) -> Iterator[Batch]:
    """The batches of the calibration sample, which are checked before they leave host memory.

    Raises:
        ValueError: a batch cannot be used, or no label counts although a stage needs logits.
    """
    labelled = []
    with naming_batch("the calibration sample"):
        for inputs in loader:
            check_batch(read.student.model, inputs, read.reads_labels)
            if read.reads_labels and (labels := read.head.labels(inputs)) is not None:
                labelled.append(bool((labels != -100).any()))
            yield read(to_device(inputs))
    if labelled and not any(labelled) and needs_logits:
        raise ValueError(
            "In the whole calibration sample no label counts (all are -100), so the stages that match logits or "
            "labels would learn nothing. Check the collator; layer stages alone need none."
        )


def measure_layers(
    batches: Iterable[Batch], teacher: Teacher, pairs: Sequence[LayerPair]
) -> dict[LayerPair, list[float]]:
    """How complex each layer's targets are for the batches' student, as a share of random targets'.

    Args:
        batches: of the calibration sample, a draw each; those after the last draw are not read.
        teacher: with its projection bank.
        pairs: the layers.

    Returns:
        by pair, a number for each draw: see [`~hf_curriculum_distill.complexity.relative_complexity`].

    Raises:
        ValueError: nothing counts in a draw, or the student's gradients cannot be taken for one example at a time.
    """
    measured: dict[LayerPair, list[float]] = {pair: [] for pair in pairs}
    for draw, batch in zip(_DRAWS, batches, strict=False):
        targets = teacher.targets(batch, Stage(hidden=pairs)).hidden
        if not all(batch.weights(hidden).any() for hidden in targets.values()):
            raise ValueError(
                f"layer_order='complexity' drew {len(batch)} examples in which no hidden state counts; raise "
                "calibration_samples, or use another layer_order."
            )
        try:
            of_layers = compare_layers(batch, targets, teacher.partial_forward.stack, draw)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                f"layer_order='complexity' takes gradients of {type(batch.model).__name__} for one example at a time, "
                f"which fails: {str(error).splitlines()[0]}; use another layer_order."
            ) from error
        for pair in pairs:
            measured[pair].append(of_layers[pair[0]])
    return measured
