"""Plots of finished runs: a metric against what it cost."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import CONFIG_NAME

from hf_curriculum_distill.files import write_files
from hf_curriculum_distill.report.curves import Curve, average, read_curves
from hf_curriculum_distill.report.page import themed
from hf_curriculum_distill.report.results import read_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOT_FILE = "comparison.png"

COSTS = ("training examples", "floating-point operations, student and teacher")  # columns of `Curve.costs`
_METRICS = {
    "eval_accuracy": "held-out accuracy",
    "eval_agreement": "held-out agreement with the teacher",
    "eval_kl": "held-out KL from the teacher (nats)",
    "eval_loss": "held-out loss",
    "eval_bits_per_byte": "held-out bits per byte",
}
_BASELINE_LOOK = ("-", "0.25")
# colours of Okabe and Ito, which readers with any kind of colour vision tell apart
_LOOKS = tuple(product(("-", "--", ":"), ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")))


def name_metric(metric: str) -> str:
    """What a reader calls a metric.

    >>> name_metric("eval_kl"), name_metric("eval_layer_3_mse")
    ('held-out KL from the teacher (nats)', 'held-out layer 3 mse')
    """
    return _METRICS.get(metric, metric.replace("eval_", "held-out ", 1).replace("_", " "))


def name_method(method: str) -> str:
    """What a reader calls a method of the library; other names are the user's own.

    >>> name_method("one_shot, seed=1")
    'one-shot, seed=1'
    """
    return re.sub(r"^one_shot\b", "one-shot", method)


def sentence(text: str) -> str:
    """Text with a capital at its beginning; the rest stays as it is.

    >>> sentence("held-out KL")
    'Held-out KL'
    """
    return text[:1].upper() + text[1:]


def choose_looks(methods: Sequence[str], baseline: str) -> dict[str, tuple[str, str]]:
    """The line style and the colour of each method; the baseline is grey."""
    looks = cycle(_LOOKS)
    return {method: _BASELINE_LOOK if method == baseline else next(looks) for method in methods}


def find_chance(results: Sequence[Mapping[str, Any]]) -> float | None:
    """The accuracy of guesses among the classes of the students; None if these are no classifiers of examples, or have
    different numbers of classes."""
    shares = set()
    for result in results:
        path = Path(result["path"], CONFIG_NAME)
        config = read_json(path) if path.is_file() else {}
        labels, architectures = config.get("id2label"), config.get("architectures")
        classifies = isinstance(architectures, list) and any(str(a).endswith("Classification") for a in architectures)
        # a configuration leaves the default out, which is two classes
        shares.add(1 / (len(labels) if isinstance(labels, dict) and labels else 2) if classifies else None)
    return shares.pop() if len(shares) == 1 else None


def reference_lines(
    results: Sequence[Mapping[str, Any]], metric: str, lines: Mapping[str, float] | None = None
) -> dict[str, float]:
    """The values that are drawn across a plot, by their names: chance where it is known, and those that are given."""
    chance = find_chance([r for r in results if r["finite"]]) if metric == "eval_accuracy" else None
    return ({} if chance is None else {"chance": chance}) | dict(lines or {})


def plot_comparison(
    results: Sequence[Mapping[str, Any]],
    path: str,
    title: str | None = None,
    metric: str = "eval_accuracy",
    baseline: str = "one_shot",
    lines: Mapping[str, float] | None = None,
) -> Figure:
    """The metric against samples and against FLOPs (student and teacher), as PNG at `path` and as SVG beside it.

    A line is the mean of a method's finite runs, the band goes from their lowest to their highest value, and a strip
    on top shows the layer stages. Where no stage has trained the head yet, dots are hollow. Needs matplotlib.

    Args:
        results: objects of `results.json`: see [`read_results`].
        path: of the PNG.
        title: above the plots; by default it names the metric.
        metric: what is drawn.
        baseline: the method that is drawn in grey.
        lines: values of the metric that are drawn across the plots, by their names, such as that of the teacher; the
            chance of classifiers is drawn in any case.

    Raises:
        ValueError: no run is finite, one was not evaluated by this metric, or its files are damaged.
    """
    from matplotlib.figure import Figure

    methods, lines = finite_curves(results, metric), reference_lines(results, metric, lines)
    figure = Figure(figsize=(10, 4.8), dpi=150, layout="constrained")
    for index, axis in enumerate(axes := figure.subplots(1, 2, sharey=True)):
        draw_curves(axis, methods, index, baseline, lines)
    axes[0].set(ylabel=name_metric(metric))
    handles, labels = axes[0].get_legend_handles_labels()
    # a line of the legend has room for about 120 letters
    labels = [label if len(label) <= 100 else f"{label[:97]}..." for label in labels]
    num_columns = max(1, min(4, len(labels), 120 // (max(map(len, labels)) + 10)))
    note = "mean and range over runs" if any(len(curves) > 1 for curves in methods.values()) else None
    figure.legend(handles, labels, loc="outside lower center", ncols=num_columns, frameon=False, title=note)
    figure.suptitle(title or sentence(f"{name_metric(metric)}, by examples and by operations"))
    save_figure(figure, path)
    return figure


def save_figure(figure: Figure, path: str) -> None:
    """Write a figure as PNG at `path`, and as SVG beside it."""
    contents = {}
    for suffix in (".png", ".svg"):
        figure.savefig(drawn := io.BytesIO(), format=suffix[1:])
        contents[str(Path(path).with_suffix(suffix))] = drawn.getvalue()
    write_files(contents)


def finite_curves(results: Sequence[Mapping[str, Any]], metric: str) -> dict[str, list[Curve]]:
    """The curves of each method that has some.

    Raises:
        ValueError: no run is finite, one was not evaluated by this metric, or its files are damaged.
    """
    methods = {method: curves for method, curves in read_curves(results, metric).items() if curves}
    if not methods:
        raise ValueError("No run is finite, so there is nothing to plot.")
    return methods


def draw_curves(
    axis: Axes,
    methods: Mapping[str, Sequence[Curve]],
    index: int,
    baseline: str = "one_shot",
    lines: Mapping[str, float] | None = None,
) -> None:
    """Draw the curves of methods against a cost; arguments as of [`plot_comparison`].

    Args:
        methods: the curves of the runs of each.
        index: of the cost, in `COSTS`.
    """
    from matplotlib.ticker import EngFormatter

    means = {method: average(curves) for method, curves in methods.items()}
    first, last = np.transpose([mean.costs[[0, -1], index] for mean, _ in means.values()])
    left = first.min() / 1.3 if last.max() > 10 * last.min() else 0.0
    strips = stack_strips({method: mean for method, (mean, _) in means.items()}, index, left)
    for method, (style, color) in choose_looks(list(methods), baseline).items():
        curves, (mean, values) = methods[method], means[method]
        x, label = mean.costs[:, index], name_method(method) + ("" if len(curves) == 1 else f" ({len(curves)} runs)")
        label = (" " if label.startswith("_") else "") + label.replace("$", r"\$")  # neither hidden nor a formula
        dots = {"marker": "o", "markersize": 3} if len(x) <= 40 else {}
        axis.plot(x, mean.values, style, color=color, label=label, zorder=3, **dots)
        untrained = mean.costs[:, 0] <= mean.head_begins[0]
        if untrained.any():
            axis.scatter(x[untrained], mean.values[untrained], 22, "white", edgecolors=color, zorder=4)
        if len(curves) > 1:  # a range has edges, which stay visible where another lies on top of it
            edges = {"edgecolor": color, "linewidth": 0.5, "zorder": 2}
            axis.fill_between(x, values.min(0), values.max(0), facecolor=f"{_hex(color)}26", **edges)
        for bottom, start, end, number in strips.get(method, []):
            shade = {"facecolor": color, "alpha": (0.3, 0.55)[number % 2], "clip_on": False}
            axis.axvspan(start, end, bottom, bottom + 0.025, **shade)
        if method in strips:
            what = "head untrained" if mean.head_begins[0] > 0 else "layer stages"
            text = {"transform": axis.get_xaxis_transform(), "va": "center", "color": color, "size": "small"}
            bottom, _, end, _ = strips[method][-1]
            axis.text(end, bottom + 0.0125, f"\N{NO-BREAK SPACE}\N{NO-BREAK SPACE}{what}", **text)
    for name, value in (lines or {}).items():
        axis.axhline(value, color="0.5", linestyle=(0, (1, 2)), linewidth=1, zorder=1)
        place = {"transform": axis.get_yaxis_transform(), "ha": "right", "va": "bottom", "color": "0.5"}
        axis.text(0.995, value, name, size="small", **place)
    if left:
        axis.set(xscale="log", xlim=(left, None))
    elif index:
        axis.ticklabel_format(axis="x", useMathText=True)
    if not index:
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set(xlabel=COSTS[index])
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="0.5", alpha=0.2)


def stack_strips(
    means: Mapping[str, Curve], index: int, left: float
) -> dict[str, list[tuple[float, float, float, int]]]:
    """The strips of layer stages above a plot: bottom (in heights of the axis), start, end and number of each.

    Args:
        means: the mean curve of each method: see [`average`].
        index: see [`draw_curves`].
        left: where the axis begins.
    """
    strips, bottom = {}, 1.01
    for method, mean in means.items():
        if mean.layer_stages:
            ends = ((np.maximum(stage[:, index], left), number) for number, stage in enumerate(mean.layer_stages))
            strips[method] = [(bottom, *map(float, stage), number) for stage, number in ends]
            bottom += 0.04
    return strips


def _hex(color: str) -> str:
    from matplotlib.colors import to_hex

    return to_hex(color)


def panels(
    results: Sequence[Mapping[str, Any]], metric: str, baseline: str, lines: Mapping[str, float] | None = None
) -> Iterator[str]:
    """The plot of each cost alone, without a legend, as SVG whose ink has the colour of the text around it.

    Arguments as of [`plot_comparison`].
    """
    from matplotlib.figure import Figure

    methods = finite_curves(results, metric)
    for index in range(len(COSTS)):
        figure = Figure(figsize=(5, 3.6), layout="constrained")
        draw_curves(axis := figure.subplots(), methods, index, baseline, lines)
        axis.set(ylabel=name_metric(metric))
        yield inline_svg(figure)


def inline_svg(figure: Figure) -> str:
    """A figure as part of a page: its text is text, and its colours are those of the page."""
    from matplotlib import rc_context

    figure.patch.set_visible(False)
    for axis in figure.axes:
        axis.patch.set_visible(False)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "page"}):
        figure.savefig(drawn := io.StringIO(), format="svg", metadata={"Date": None, "Creator": None})
    svg = drawn.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # an id occurs once in a page
    svg = re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", svg)  # as wide as the page has room
    return themed(svg)
