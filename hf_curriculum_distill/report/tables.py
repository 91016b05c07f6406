"""Tables of finished runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from hf_curriculum_distill.report.curves import read_curves

_COLUMNS = {
    "method": ("method", str),
    "eval_bits_per_byte": ("bits/byte", "{:.4f}".format),
    "eval_accuracy": ("accuracy", "{:.4f}".format),
    "eval_agreement": ("agreement", "{:.4f}".format),
    "eval_kl": ("KL", "{:.4f}".format),
    "samples": ("samples", "{:,}".format),
    "flops": ("FLOPs", "{:.2e}".format),
    "seconds": ("seconds", "{:.0f}".format),
}
_OF_TEXT = "eval_bits_per_byte"  # a column where a result has it


def format_table(results: Sequence[Mapping[str, Any]]) -> str:
    """[`list_results`] as lines."""
    return align(list_results(results))


def list_results(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A table with a row for each trained model, after a row of titles.

    Args:
        results: objects of `results.json`, or parts of them. Accuracy and agreement are shares of the labels that
            count, KL is in nats, and FLOPs are those of student and teacher. Bits a byte are a column only if a result
            has them.
    """
    columns = {n: column for n, column in _COLUMNS.items() if n != _OF_TEXT or any(n in result for result in results)}
    rows = [[title for title, _ in columns.values()]]
    for result in results:
        values = dict(result)
        if "student_flops" in values:
            values["flops"] = values["student_flops"] + values["teacher_flops"]
        rows.append([show(values[name]) if name in values else "-" for name, (_, show) in columns.items()])
    return rows


def format_summary(
    results: Sequence[Mapping[str, Any]],
    metric: str = "eval_accuracy",
    threshold: float | None = None,
    baseline: str = "one_shot",
) -> str:
    """[`summarize_methods`] as lines."""
    heading, rows = summarize_methods(results, metric, threshold, baseline)
    return "\n".join([*heading, "", align(rows)])


def summarize_methods(
    results: Sequence[Mapping[str, Any]],
    metric: str = "eval_accuracy",
    threshold: float | None = None,
    baseline: str = "one_shot",
) -> tuple[list[str], list[list[str]]]:
    """A table with a row for each method: where its finite runs ended, and at which cost they reached the threshold.

    A run reaches the threshold at the first evaluation that is at least as good (for a loss or KL: at most as high).
    The cost is the median over runs; that of a run that never gets there is infinite. A run that learns nothing has an
    accuracy (or another share) of 0 already, so 0 is no threshold.

    Args:
        results: objects of `results.json`: see [`read_results`].
        metric: what is compared.
        threshold: the value to reach; by default the worst at which a run of the baseline ended (without baseline: any
            run), which each of these reaches.
        baseline: the method whose cost is divided by that of each method.

    Returns:
        two lines that say what the columns are, and the rows, the first of them titles.

    Raises:
        ValueError: a run was not evaluated by this metric, or its files are damaged, or the threshold is not finite.
    """
    if threshold is not None and not math.isfinite(threshold):
        raise ValueError(f"threshold is {threshold}; give a finite value of {metric}.")
    methods, lower = read_curves(results, metric), metric.endswith(("loss", "kl"))
    judges = methods.get(baseline) or list(chain(*methods.values()))
    level = f"{threshold}"
    if threshold is None and judges:
        threshold = (max if lower else min)(curve.values[-1] for curve in judges)
        whose = baseline if methods.get(baseline) else "all methods"
        level = f"{threshold:.4g} (the {'highest' if lower else 'lowest'} final value of {whose})"
    is_share = not lower and all((curve.values >= 0).all() for curve in chain(*methods.values()))
    races = bool(judges) and not (is_share and threshold <= 0)
    if races:
        to_reach = f"to reach {level}: median over runs, if more than half of them do"
    else:
        to_reach = (
            f"nothing to reach: {level} takes no learning; give a threshold above 0" if judges else "no run is finite"
        )
    heading = [
        f"{metric} at the end: mean ± sample standard deviation over runs; FLOPs of student and teacher",
        to_reach,
    ]
    rows = [["method", "runs", metric, "samples", "FLOPs", "reach", "samples to reach", "FLOPs to reach"]]
    if races and methods.get(baseline):
        heading[1] += f"; ratio: cost of {baseline} / of the method"
        rows[0] += ["samples ratio", "FLOPs ratio"]
    threshold = threshold if races else (-np.inf if lower else np.inf)
    reached = {m: [c.cost_to_reach(threshold, lower) for c in curves] for m, curves in methods.items()}
    medians = {m: np.median(costs or [[np.inf, np.inf]], axis=0) for m, costs in reached.items()}
    num_runs = Counter(result["method"] for result in results)
    for method, curves in methods.items():
        num_finite, total = len(curves), num_runs[method]
        row = [method, f"{total}" if num_finite == total else f"{num_finite} of {total} finite"]
        if curves:
            finals = [curve.values[-1] for curve in curves]
            deviation = f" ± {np.std(finals, ddof=1):.4f}" if num_finite > 1 else ""
            num_reached = int(np.isfinite(reached[method]).all(1).sum())
            row += [f"{np.mean(finals):.4f}{deviation}", *_show_cost(np.mean([c.costs[-1] for c in curves], axis=0))]
            if races:
                row += [f"{num_reached}/{num_finite}", *(_show_cost(medians[method]) if num_reached else ["never"] * 2)]
            both = [medians[baseline], medians[method]] if methods.get(baseline) else [np.inf]
            # what is reached before the first step costs nothing, and has no ratio
            if np.isfinite(both).all() and np.all(medians[method]):
                row += [f"{ratio:.2f}" for ratio in medians[baseline] / medians[method]]
        rows.append(row + ["-"] * (len(rows[0]) - len(row)))
    return heading, rows


def _show_cost(cost: np.ndarray) -> list[str]:
    return [f"{cost[0]:,.0f}", f"{cost[1]:.2e}"] if np.isfinite(cost).all() else ["-", "-"]


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines, the first as a heading; the first column is flush left, all others flush right.

    >>> print(align([["method", "steps"], ["one_shot", "8"]]))
    method    steps
    ---------------
    one_shot      8
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]) for first, *others in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
