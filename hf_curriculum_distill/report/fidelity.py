"""How faithful a student is to its teacher: agreement, calibration, and the examples on which they differ most."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_curriculum_distill.batches.batch import Batch
from hf_curriculum_distill.layers.heads import decodes_labels, predicts_next_token
from hf_curriculum_distill.losses import shared_classes
from hf_curriculum_distill.stages import matched_pairs
from hf_curriculum_distill.trainer import CurriculumDistillationTrainer


@dataclass(frozen=True)
class Example:
    """What student and teacher predict for one example.

    Args:
        number: of the example in the evaluation, from 0.
        kl: the mean over its rows of KL(teacher || student), in nats.
        inputs: its token ids `[length]`; None where it is no text.
        rows: what each row predicts, by name and each `[rows]`: `position` (of the token that is predicted; -1 for the
            whole example), `student` and `teacher` (the likeliest class), `student_confidence` and `teacher_confidence`
            (its probability), `label` (-1: none) and `kl`.
    """

    number: int
    kl: float
    inputs: np.ndarray | None
    rows: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Fidelity:
    """What [`measure_fidelity`] finds.

    Args:
        metrics: those of the evaluation, such as `eval_agreement`, `eval_kl` and `eval_layer_3_mse`; where there are
            labels, `eval_teacher_accuracy` and the calibration errors `eval_ece` and `eval_teacher_ece`, too.
        pairs: `(student_layer, teacher_layer)` that were compared.
        rows: of all examples, as in [`Example`].
        examples: those with the highest mean KL, the highest first.
    """

    metrics: Mapping[str, float]
    pairs: tuple[tuple[int, int], ...]
    rows: Mapping[str, np.ndarray]
    examples: list[Example] = field(default_factory=list)


def measure_fidelity(
    trainer: CurriculumDistillationTrainer, eval_dataset: Any = None, num_examples: int = 10
) -> Fidelity:
    """Evaluate a student beside its teacher, in one process.

    Args:
        trainer: holds student, teacher and data. With `evaluate_layers`, and a bank that was calibrated, the layers are
            compared, too.
        eval_dataset: what is evaluated on; by default the trainer's.
        num_examples: how many examples to keep.

    Raises:
        ValueError: there are several processes, no teacher, or nothing that student and teacher both predict.
    """
    if trainer.args.world_size > 1 or trainer.teacher is None:
        problem = "has no teacher" if trainer.teacher is None else f"runs in {trainer.args.world_size} processes"
        raise ValueError(f"The trainer {problem}; a report compares a student with its teacher, in one process.")
    recorder = _Recorder(num_examples)
    trainer._comparison.observe = recorder
    try:
        metrics = trainer.evaluate(eval_dataset)
    finally:
        trainer._comparison.observe = None
    if not recorder.columns:
        raise ValueError(
            "Student and teacher have no logits of classes that could be compared in this evaluation; a report needs "
            "two models of one task, and data with labels."
        )
    rows = {name: np.concatenate([each[name] for each in recorder.columns]) for name in recorder.columns[0]}
    metrics = {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}
    if (labelled := rows["label"] >= 0).any():
        right = {who: rows[who][labelled] == rows["label"][labelled] for who in ("student", "teacher")}
        errors = {who: calibration_error(rows[f"{who}_confidence"][labelled], right[who]) for who in right}
        metrics |= {"eval_teacher_accuracy": float(right["teacher"].mean())}
        metrics |= {"eval_ece": errors["student"], "eval_teacher_ece": errors["teacher"]}
    compared = tuple(pair for pair in matched_pairs(trainer.stages) if f"eval_layer_{pair[0]}_mse" in metrics)
    return Fidelity(metrics, compared, rows, recorder.worst())


def calibration_error(confidence: np.ndarray, right: np.ndarray, num_bins: int = 15) -> float:
    """The expected calibration error of Guo et al. (2017): the mean over predictions of |accuracy - confidence| of
    their bin.

    Args:
        confidence: the probability of each prediction, `[predictions]`.
        right: whether each is right.
        num_bins: of equal width from 0 to 1.

    >>> calibration_error(np.array([0.9, 0.9, 0.6, 0.6]), np.array([True, True, True, False]))
    0.1
    """
    shares, means, accuracies = reliability(confidence, right, num_bins)
    return round(float((shares * np.abs(accuracies - means)).sum()), 12)


def reliability(
    confidence: np.ndarray, right: np.ndarray, num_bins: int = 15
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The share of predictions, the mean confidence and the accuracy of each bin that has predictions.

    Arguments as of [`calibration_error`].
    """
    bins = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    used = [bins == each for each in np.unique(bins)]
    return tuple(
        np.array([float(values[each].mean()) if values is not None else each.mean() for each in used])
        for values in (None, confidence, right)
    )


class _Recorder:
    """Keeps what is predicted for each row of an evaluation, and all of the examples that differ most."""

    def __init__(self, num_examples: int):
        self.columns: list[dict[str, np.ndarray]] = []
        self._num_seen, self._num_examples = 0, num_examples
        self._worst: list[tuple[float, int, Example]] = []  # a heap, the least different first

    def __call__(self, batch: Batch, rows: Tensor, student_logits: Tensor, teacher_logits: Tensor) -> None:
        if batch.head.predicts_numbers:
            return
        first, self._num_seen = self._num_seen, self._num_seen + len(batch)
        columns = _compare(student_logits, teacher_logits, batch.labels)
        per_example, shift = batch.rows_per_example, predicts_next_token(batch.model)
        examples, positions = (each.cpu().numpy() for each in (rows // per_example, rows % per_example))
        columns["position"] = positions + shift if batch.row_per_token else np.full_like(positions, -1)
        self.columns.append(columns)
        for number in np.unique(examples):
            own = {name: column[examples == number] for name, column in columns.items()}
            text = _read_text(batch, int(number), own)
            example = Example(first + int(number), float(own["kl"].mean()), text, own)
            entry = (example.kl, -example.number, example)  # numbers differ, so that examples are never compared
            (heapq.heappush if len(self._worst) < self._num_examples else heapq.heappushpop)(self._worst, entry)

    def worst(self) -> list[Example]:
        return [example for *_, example in sorted(self._worst, reverse=True)]


def _read_text(batch: Batch, number: int, rows: dict[str, np.ndarray]) -> np.ndarray | None:
    """The token ids of an example without padding, and the positions of its rows among them; None if it is no text."""
    name = "labels" if decodes_labels(batch.model) else "input_ids"  # of a decoder, what is predicted
    if name not in batch.inputs or (name == "input_ids" and batch.model.main_input_name != name):
        return None
    ids, mask = batch.inputs[name][number].cpu().numpy(), batch.inputs.get("attention_mask")
    counted = ids != -100 if name == "labels" or mask is None else mask[number].bool().cpu().numpy()
    if counted.shape == ids.shape:
        rows["position"] = np.where(rows["position"] < 0, -1, (np.cumsum(counted) - 1)[rows["position"]])
        ids = ids[counted]
    return ids


@torch.no_grad()
def _compare(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None) -> dict[str, np.ndarray]:
    """What each row predicts: see [`Example`]."""
    student_logits = shared_classes(student_logits, teacher_logits)
    logits = {"student": student_logits, "teacher": teacher_logits}
    logs = {who: F.log_softmax(each.float(), -1) for who, each in logits.items()}
    columns = {"kl": F.kl_div(logs["student"], logs["teacher"], reduction="none", log_target=True).sum(-1)}
    for who, each in logs.items():
        confidence, columns[who] = each.max(-1)
        columns[f"{who}_confidence"] = confidence.exp()
    columns["label"] = torch.full_like(columns["student"], -1) if labels is None else labels
    return {name: column.cpu().numpy() for name, column in columns.items()}
