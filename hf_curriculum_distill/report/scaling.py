"""How many examples a method needs as a task grows: searches, the slope of a line through their ends, and a plot."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hf_curriculum_distill.report.figures import choose_looks, name_method, save_figure
from hf_curriculum_distill.report.tables import align

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS_FILE, SCALING_PLOT = "scaling.json", "scaling.png"


def budgets(smallest: int, largest: int) -> list[int]:
    """Steps of trainings, each the square root of 2 times as long as the one before, `largest` the last.

    >>> budgets(100, 400)
    [100, 141, 200, 283, 400]
    """
    if not 0 < smallest <= largest:
        raise ValueError(f"The shortest training has {smallest} steps, the longest {largest}; the first must be less.")
    number = round(2 * math.log2(largest / smallest))
    return sorted({round(largest / 2 ** (index / 2)) for index in range(number + 1)})


class Slope(NamedTuple):
    """A line `log2(samples) = value * x + constant` through all runs: its slope and the slope's standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {2 * self.error:.2f}"


def fit_slope(x: Sequence[float], log_samples: Sequence[float]) -> Slope | None:
    """Least squares; None for fewer than 3 points or 2 places.

    >>> fit_slope([1.0, 2.0, 3.0], [3.0, 5.0, 7.0])
    Slope(value=2.0, error=0.0)
    """
    if len(x) < 3 or len(set(x)) < 2:
        return None
    x, y = np.asarray(x, dtype=float), np.asarray(log_samples, dtype=float)
    centred = x - x.mean()
    slope = float(centred @ y / (centred @ centred))
    residuals = y - y.mean() - slope * centred
    return Slope(slope, float(np.sqrt(residuals @ residuals / (len(x) - 2) / (centred @ centred))))


def summarize_searches(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[tuple[int, int], list[float]]]:
    """The samples that each method needed, by the task's (dimension, sparsity): one number a finished search.

    A search that ended at its largest budget without success has infinity; one that is not finished is left out.
    """
    ends: dict[tuple, float] = {}
    for record in records:
        key = record["method"], (record["dimension"], record["sparsity"]), record["seed"]
        if record["reached"]:
            ends[key] = record["samples"]
        elif record["last"]:
            ends[key] = math.inf
    found: dict[str, dict[tuple[int, int], list[float]]] = {}
    for (method, size, _), samples in sorted(ends.items(), key=lambda item: item[0][1:]):
        found.setdefault(method, {}).setdefault(size, []).append(samples)
    return found


def slope_of(searches: Mapping[tuple[int, int], Sequence[float]], axis: int) -> Slope | None:
    """The slope over the sizes of which every search succeeded: in log2(dimension) for axis 0, in bits for axis 1."""
    reached = {size: samples for size, samples in searches.items() if np.isfinite(samples).all()}
    points = [(size[axis], math.log2(value)) for size, samples in reached.items() for value in samples]
    return fit_slope([math.log2(x) if axis == 0 else x for x, _ in points], [y for _, y in points])


def format_scaling(records: Sequence[Mapping[str, Any]], num_seeds: int, axis: int) -> str:
    """A table of the median samples of each method and size, and each method's slope.

    Args:
        records: of the searches, those of the recipe's `scaling.json`.
        num_seeds: that were asked for: a size with fewer finished searches says so.
        axis: 0 if the dimension grows, 1 if the sparsity does.
    """
    found = summarize_searches(records)
    sizes = sorted({size for searches in found.values() for size in searches})
    rows = [["(d, k)", *found]]
    for size in sizes:
        rows.append([f"({size[0]}, {size[1]})"])
        for searches in found.values():
            samples = searches.get(size, [])
            reached = [value for value in samples if math.isfinite(value)]
            cell = f"{np.median(samples):,.0f}" if len(reached) > len(samples) / 2 else "not within budget"
            if len(reached) < len(samples) or len(samples) < num_seeds:
                cell += f" [{len(reached)} of {len(samples)}]"
            rows[-1].append(cell if samples else "not finished")
    rows.append([("samples ~ d^c", "samples ~ 2^(c k)")[axis]])
    for searches in found.values():
        slope = slope_of(searches, axis)
        rows[-1].append("-" if slope is None else f"c = {slope}")
    return f"{align(rows)}\n± is 2 standard errors; [n of m]: n searches succeeded of m that ended"


def plot_scaling(records: Sequence[Mapping[str, Any]], path: str, axis: int) -> Figure:
    """Samples against the task's size, as PNG and SVG; an open triangle is a search that did not succeed.

    Args:
        records: as for [`format_scaling`].
        path: of the PNG.
        axis: 0 for the dimension, on a logarithmic axis; 1 for the sparsity.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(6, 4.6), dpi=150, layout="constrained")
    plot = figure.subplots()
    largest = {record["method"]: record["samples"] for record in records if record["last"]}
    by_method = summarize_searches(records)
    looks = choose_looks(list(by_method), baseline="one_shot")
    for method, searches in by_method.items():
        style, color = looks[method]
        slope = slope_of(searches, axis)
        name = name_method(method)
        label = name if slope is None else f"{name}: {('d^c', '2^(c k)')[axis]}, c = {slope}"
        medians = {size[axis]: m for size, each in searches.items() if math.isfinite(m := float(np.median(each)))}
        plot.plot(list(medians), list(medians.values()), style, color=color, label=label)
        for size, each in searches.items():
            for value in each:
                marker = {"marker": "o"} if math.isfinite(value) else {"marker": "^", "markerfacecolor": "none"}
                plot.plot(size[axis], min(value, largest.get(method, value)), color=color, markersize=5, **marker)
    plot.set(yscale="log", ylabel="examples to a held-out accuracy of 0.99")
    plot.set_xlabel(("dimension d", "sparsity k")[axis])
    ticks = sorted({record[("dimension", "sparsity")[axis]] for record in records})
    if axis == 0:
        plot.set_xscale("log")
        plot.xaxis.set_minor_formatter("")
    plot.set_xticks(ticks)
    plot.xaxis.set_major_formatter(ScalarFormatter())
    plot.spines[["top", "right"]].set_visible(False)
    plot.grid(color="0.9")
    figure.legend(loc="outside lower center", frameon=False, title="line: median; triangle: not within budget")
    save_figure(figure, path)
    return figure
