"""What a run had reached after which cost, read from its logs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers.trainer import TRAINER_STATE_NAME

from hf_curriculum_distill.report.results import read_json, read_record, require
from hf_curriculum_distill.resuming.record import FILE_NAME as RECORD_FILE


@dataclass(frozen=True)
class Curve:
    """The evaluations of a run in order. A cost is a pair: examples, and operations of student and teacher."""

    values: np.ndarray  # of the metric, [evaluations]
    costs: np.ndarray  # spent until then, [evaluations, 2]
    layer_stages: list[np.ndarray]  # costs [2 ends, 2] at which each begins and ends
    # costs [2] before the first stage that trains the head; negative if that is the first stage
    head_begins: np.ndarray = field(default_factory=lambda: np.full(2, -1.0))

    def cost_to_reach(self, threshold: float, lower: bool) -> np.ndarray:
        """Cost of the first evaluation at least as good as the threshold; infinite if there is none."""
        (reached,) = np.nonzero(self.values <= threshold if lower else self.values >= threshold)
        return self.costs[reached[0]] if len(reached) else np.full(2, np.inf)


def read_curves(results: Iterable[Mapping[str, Any]], metric: str) -> dict[str, list[Curve]]:
    """The curves of each method's finite runs.

    Raises:
        ValueError: a run was not evaluated by the metric, or its files are damaged.
    """
    curves: dict[str, list[Curve]] = {result["method"]: [] for result in results}
    for result in results:
        if result["finite"]:
            curves[result["method"]].append(_read_curve(result, metric))
    return curves


def _read_curve(result: Mapping[str, Any], metric: str) -> Curve:
    state_path, record_path = (Path(result["path"], name) for name in (TRAINER_STATE_NAME, RECORD_FILE))
    state, last = read_json(state_path), result["steps"]
    require(state_path, state, "log_history")
    record = read_record(Path(result["path"]))
    require(record_path, record, "stages")
    evaluations = [*state["log_history"], {**result, "step": last}]
    names = sorted(_metric_names(evaluations))
    if metric not in names:
        raise ValueError(
            f"{result['path']} has no {metric!r}; it was evaluated by "
            f"{', '.join(names) or 'nothing while it trained: set eval_strategy'}."
        )
    values, spent = {}, {0: 0.0}
    for entry in evaluations:
        if metric in entry:
            require(state_path, entry, "step", metric)
            values[entry["step"]] = entry[metric]
    for entry in (*state["log_history"], record):  # the record has the total at the end, whenever that was logged
        if "student_flops" in entry:
            require(state_path, entry, "step", "student_flops", "teacher_flops")
            spent[entry["step"]] = entry["student_flops"] + entry["teacher_flops"]
    for stage in record["stages"]:
        require(record_path, stage, "until", "kl_weight", "label_weight")
    ends = [0, *(min(stage["until"] or last, last) for stage in record["stages"])]
    if unknown := sorted({*ends} - {*spent}):
        raise ValueError(
            f"{state_path} has no student_flops of step {unknown[0]}, where a stage ends; train with a "
            "logging_strategy other than 'no'."
        )

    def cost(step: int) -> tuple[float, float]:
        known = sorted(spent)
        return step * result["samples"] / last, np.interp(step, known, [spent[s] for s in known])

    layer_stages = [
        np.array([cost(ends[index]), cost(ends[index + 1])])
        for index, stage in enumerate(record["stages"])
        if not (stage["kl_weight"] or stage["label_weight"])
    ]
    heads = [index for index, stage in enumerate(record["stages"]) if stage["kl_weight"] or stage["label_weight"]]
    begins = next(iter(heads), len(record["stages"]))
    head_begins = np.array(cost(ends[begins])) if begins else np.full(2, -1.0)
    steps = sorted(values)
    return Curve(np.array([values[s] for s in steps]), np.array([cost(s) for s in steps]), layer_stages, head_begins)


def shared_metrics(results: Iterable[Mapping[str, Any]]) -> list[str]:
    """The metrics by which all finite runs were evaluated, those first that say most of a student.

    Raises:
        ValueError: a file is damaged.
    """
    names: list[set[str]] = []
    for result in results:
        if result["finite"]:
            path = Path(result["path"], TRAINER_STATE_NAME)
            require(path, state := read_json(path), "log_history")
            names.append(_metric_names([*state["log_history"], result]))
    shared = set.intersection(*names) if names else set()
    first = [f"eval_{name}" for name in ("accuracy", "agreement", "kl", "loss")]
    return [name for name in first if name in shared] + sorted(shared - {*first})


def _metric_names(evaluations: Iterable[Mapping[str, Any]]) -> set[str]:
    names = {name for entry in evaluations for name in entry if name.startswith("eval_")}
    return {name for name in names if not name.endswith(("_runtime", "_per_second"))}


def average(curves: Sequence[Curve]) -> tuple[Curve, np.ndarray]:
    """The mean of runs with the same stages, and each run's values [runs, points], wherever all have been evaluated.

    Runs that were evaluated at different points are interpolated, over samples, at all of them.
    """
    samples = [curve.costs[:, 0] for curve in curves]
    points = np.unique(np.concatenate(samples))
    points = points[(points >= max(s[0] for s in samples)) & (points <= min(s[-1] for s in samples))]
    flops = [np.interp(points, curve.costs[:, 0], curve.costs[:, 1]) for curve in curves]
    values = np.stack([np.interp(points, curve.costs[:, 0], curve.values) for curve in curves])
    costs = np.stack([points, np.mean(flops, axis=0)], axis=1)
    stages = [np.mean(ends, axis=0) for ends in zip(*(curve.layer_stages for curve in curves), strict=False)]
    head_begins = np.mean([curve.head_begins for curve in curves], axis=0)
    return Curve(values.mean(0), costs, stages, head_begins), values
