"""What finished runs left: `results.json`, and each run's `trainer_state.json` and `curriculum.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_curriculum_distill.files import replacing

RESULTS_FILE = "results.json"
STATE_FILE = "trainer_state.json"
RECORD_FILE = "curriculum.json"


def write_results(folder: str, results: Sequence[Mapping[str, Any]]) -> None:
    """Write `results.json`: a list with one object per trained model."""
    os.makedirs(folder, exist_ok=True)
    with replacing(os.path.join(folder, RESULTS_FILE)) as path, open(path, "w", encoding="utf-8") as file:
        json.dump(list(results), file, indent=2)
        file.write("\n")


def read_results(folders: Iterable[str]) -> list[dict[str, Any]]:
    """The objects of the folders' `results.json`; the folder of a single run stands for that run. Each run comes once.

    Raises:
        FileNotFoundError: a folder is missing or is neither of them, or a result's run is not found.
        ValueError: a file is damaged, or two runs have the same method and seed.
    """
    results: dict[str, dict[str, Any]] = {}
    for folder in map(Path, folders):
        if (folder / RESULTS_FILE).is_file():
            found = _read_results_file(folder)
        elif (folder / STATE_FILE).is_file() and (folder / RECORD_FILE).is_file():
            found = [_read_single_run(folder)]
        else:
            there = ", ".join(sorted(os.listdir(folder))) or "nothing" if folder.is_dir() else "no such folder"
            raise FileNotFoundError(
                f"{folder} has neither {RESULTS_FILE} (a recipe's output) nor {STATE_FILE} and {RECORD_FILE} (a "
                f"finished run); there is {there}."
            )
        for result in found:
            results.setdefault(os.path.realpath(result["path"]), result)
    firsts: dict[tuple, str] = {}
    for path, result in results.items():
        seed = result.get("seed")
        first = firsts.setdefault((result["method"], path if seed is None else seed), path)
        if first != path:
            raise ValueError(
                f"{first} and {path} are both {result['method']!r} with seed {seed}, so something else differs and no "
                f"mean is meaningful; compare them apart, or rename a method in {RESULTS_FILE}."
            )
    return list(results.values())


def _read_results_file(folder: Path) -> list[dict[str, Any]]:
    results = _read_json(folder / RESULTS_FILE, list)
    for result in results:
        _require(folder / RESULTS_FILE, result, "method", "path", "finite")
        if result["finite"]:
            _require(folder / RESULTS_FILE, result, "samples", "steps")
            result["path"] = str(_find_run(result["path"], folder))
    return results


def _find_run(path: str, folder: Path) -> Path:
    """A run's folder as `results.json` names it or, after a move, the end of that name below or beside `folder`."""
    parts = Path(path).parts
    ends = [Path(*parts[start:]) for start in range(len(parts))]
    for run in (Path(path), *(base / end for end in ends for base in (folder, folder.resolve().parent))):
        if (run / STATE_FILE).is_file():
            return run
    raise FileNotFoundError(f"{folder / RESULTS_FILE} names the run {path}, but there is no {STATE_FILE} in it.")


def _read_single_run(folder: Path) -> dict[str, Any]:
    """What `results.json` would say of a run."""
    state, record = _read_json(folder / STATE_FILE), _read_json(folder / RECORD_FILE)
    _require(folder / STATE_FILE, state, "log_history", "global_step")
    _require(folder / RECORD_FILE, record, "method", "samples_per_step")
    steps = state["global_step"]
    samples = steps * record["samples_per_step"]
    return {"method": record["method"], "samples": samples, "steps": steps, "finite": True, "path": str(folder)}


def _read_json(path: Path, kind: type = dict) -> Any:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    if not isinstance(values, kind):
        raise ValueError(f"{path} is damaged: it holds a {type(values).__name__}, not a {kind.__name__}.")
    return values


def _require(path: Path, values: Any, *names: str) -> None:
    if missing := [name for name in names if not isinstance(values, dict) or name not in values]:
        raise ValueError(f"{path} is damaged: no {', '.join(missing)} in {str(values)[:60]}.")


@dataclass(frozen=True)
class Curve:
    """The evaluations of a run in order. A cost is a pair: examples, and operations of student and teacher."""

    values: np.ndarray  # of the metric, [evaluations]
    costs: np.ndarray  # spent until then, [evaluations, 2]
    layer_stages: list[np.ndarray]  # costs [2 ends, 2] at which each begins and ends

    def cost_to_reach(self, threshold: float, lower: bool) -> np.ndarray:
        """Cost of the first evaluation at least as good as the threshold; infinite if there is none."""
        (reached,) = np.nonzero(self.values <= threshold if lower else self.values >= threshold)
        return self.costs[reached[0]] if len(reached) else np.full(2, np.inf)


def read_curves(results: Iterable[Mapping[str, Any]], metric: str) -> dict[str, list[Curve]]:
    """The curves of each method's finite runs."""
    curves: dict[str, list[Curve]] = {result["method"]: [] for result in results}
    for result in results:
        if result["finite"]:
            curves[result["method"]].append(_read_curve(result, metric))
    return curves


def _read_curve(result: Mapping[str, Any], metric: str) -> Curve:
    state_path, record_path = (Path(result["path"], name) for name in (STATE_FILE, RECORD_FILE))
    state, record, last = _read_json(state_path), _read_json(record_path), result["steps"]
    _require(state_path, state, "log_history")
    _require(record_path, record, "stages")
    evaluations = [*state["log_history"], {**result, "step": last}]
    values = {entry["step"]: entry[metric] for entry in evaluations if metric in entry}
    names = {name for entry in evaluations for name in entry if name.startswith("eval_")}
    names = sorted(name for name in names if not name.endswith(("_runtime", "_per_second")))
    if metric not in names:
        raise ValueError(f"{result['path']} has no {metric!r}; it was evaluated by {', '.join(names) or 'nothing'}.")
    spent = {0: 0.0} | {
        entry["step"]: entry["student_flops"] + entry["teacher_flops"]
        for entry in (*state["log_history"], record)  # the record has the total at the end, whenever that was logged
        if "student_flops" in entry
    }
    ends = [0, *(min(stage["until"] or last, last) for stage in record["stages"])]
    if unknown := sorted({*ends} - {*spent}):
        raise ValueError(
            f"{state_path} has no student_flops of step {unknown[0]}, where a stage ends; train with a "
            "logging_strategy other than 'no'."
        )

    def cost(step: int) -> tuple[float, float]:
        return step * result["samples"] / last, np.interp(step, list(spent), list(spent.values()))

    layer_stages = [
        np.array([cost(ends[index]), cost(ends[index + 1])])
        for index, stage in enumerate(record["stages"])
        if not (stage["kl_weight"] or stage["label_weight"])
    ]
    steps = sorted(values)
    return Curve(np.array([values[s] for s in steps]), np.array([cost(s) for s in steps]), layer_stages)


def average(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Mean costs [points, 2] and each run's values [runs, points] wherever all runs have been evaluated.

    Runs that were evaluated at different points are interpolated, over samples, at all of them.
    """
    samples = [curve.costs[:, 0] for curve in curves]
    points = np.unique(np.concatenate(samples))
    points = points[(points >= max(s[0] for s in samples)) & (points <= min(s[-1] for s in samples))]
    flops = [np.interp(points, curve.costs[:, 0], curve.costs[:, 1]) for curve in curves]
    values = [np.interp(points, curve.costs[:, 0], curve.values) for curve in curves]
    return np.stack([points, np.mean(flops, axis=0)], axis=1), np.stack(values)
