"""Tables and plots of finished runs, from `results.json` and each run's `trainer_state.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

RESULTS_FILE = "results.json"
_COLUMNS = {
    "method": ("method", str),
    "eval_accuracy": ("accuracy", "{:.4f}".format),
    "eval_agreement": ("agreement", "{:.4f}".format),
    "eval_kl": ("KL", "{:.4f}".format),
    "samples": ("samples", "{:,}".format),
    "flops": ("FLOPs", "{:.2e}".format),
    "seconds": ("seconds", "{:.0f}".format),
}


def write_results(folder: str, results: Sequence[Mapping[str, Any]]) -> None:
    """Write `results.json`: a list with one object per trained model."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, RESULTS_FILE), "w", encoding="utf-8") as file:
        json.dump(list(results), file, indent=2)
        file.write("\n")


def format_table(results: Sequence[Mapping[str, Any]]) -> str:
    """One line a trained model; accuracy and agreement are shares of the counted labels, KL is in nats."""
    rows = [[title for title, _ in _COLUMNS.values()]]
    for result in results:
        values = dict(result)
        if "student_flops" in values:
            values["flops"] = values["student_flops"] + values["teacher_flops"]
        rows.append([show(values[name]) if name in values else "-" for name, (_, show) in _COLUMNS.items()])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append("  ".join(cells))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def plot_comparison(results: Sequence[Mapping[str, Any]], path: str, title: str) -> None:
    """Held-out accuracy against samples and against FLOPs (student and teacher), as PNG; layer stages are shaded."""
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for result in results:
        curve = _learning_curve(result)
        for axis, xs in zip(axes, (curve["samples"], curve["flops"]), strict=True):
            axis.plot(xs, curve["accuracy"], marker="o", markersize=3, label=result["method"])
            for index, end in enumerate(curve["layer_stage_ends"]):
                start = curve["layer_stage_ends"][index - 1] if index else 0
                axis.axvspan(
                    *(_at(curve, xs, step) for step in (start, end)), color="C7", alpha=0.12 + 0.06 * (index % 2)
                )
    axes[0].set(xlabel="training examples", ylabel="held-out accuracy on masked tokens")
    axes[1].set(xlabel="floating-point operations, student and teacher")
    axes[0].legend(frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _learning_curve(result: Mapping[str, Any]) -> dict[str, list]:
    """Evaluations of one run, by step, with the samples and operations spent until then."""
    with open(os.path.join(result["path"], "trainer_state.json"), encoding="utf-8") as file:
        history = json.load(file)["log_history"]
    spent = {0: 0.0} | {e["step"]: e["student_flops"] + e["teacher_flops"] for e in history if "student_flops" in e}
    evaluations = {e["step"]: e["eval_accuracy"] for e in history if "eval_accuracy" in e}
    with open(os.path.join(result["path"], "curriculum.json"), encoding="utf-8") as file:
        stages = json.load(file)["stages"]
    steps = sorted(evaluations)
    return {
        "steps": steps,
        "accuracy": [evaluations[step] for step in steps],
        "samples": [step * result["samples"] / result["steps"] for step in steps],
        "flops": [float(np.interp(step, list(spent), list(spent.values()))) for step in steps],
        "layer_stage_ends": [stage["until"] for stage in stages if not (stage["kl_weight"] or stage["label_weight"])],
    }


def _at(curve: Mapping[str, list], xs: Sequence[float], step: int) -> float:
    return float(np.interp(step, [0, *curve["steps"]], [0, *xs]))
