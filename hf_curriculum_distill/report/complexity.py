"""Table and plot of supervision complexity along one or several runs: see [`complexity.along`]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from glob import glob
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import AutoTokenizer, DataCollatorWithPadding, default_data_collator

from hf_curriculum_distill.complexity.along import COMPLEXITY_FILE, FINAL, NOW, Point, load_model, read_points
from hf_curriculum_distill.report.figures import save_figure
from hf_curriculum_distill.report.tables import align
from hf_curriculum_distill.tasks.classification import encode_task, read_task
from hf_curriculum_distill.tasks.images import read_images
from hf_curriculum_distill.teachers.checkpoints import find_checkpoints

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMPLEXITY_PLOT = "complexity.png"
# what should be at least as complex as what follows it (Harutyunyan et al., 2023)
ORDER = ("random labels", "labels", FINAL, NOW)
_LOOKS = {
    "random labels": ("--", "0.25"),
    "labels": ("-", "0.25"),
    FINAL: ("-", "#0072b2"),
    NOW: ("-", "#d55e00"),
}
_OF_LAYERS = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def read_runs(folders: Sequence[str]) -> list[list[Point]]:
    """The points of each run, of a folder with `complexity.json`, or of the runs directly inside it.

    Raises:
        FileNotFoundError: a folder has neither.
        ValueError: a file is damaged, or the runs were measured at no common step.
    """
    runs = []
    for folder in folders:
        own = Path(folder, COMPLEXITY_FILE)
        inside = [own] if own.is_file() else sorted(map(Path, glob(f"{folder}/*/{COMPLEXITY_FILE}")))
        if not inside:
            raise FileNotFoundError(
                f"{folder} has no {COMPLEXITY_FILE}; train with SupervisionComplexityCallback, or measure its "
                "checkpoints with --teacher and --dataset."
            )
        runs += [read_points(str(path.parent)) for path in inside]
    if not set.intersection(*({point.step for point in run} for run in runs)):
        raise ValueError(f"{', '.join(folders)}: the runs were measured at no common step.")
    return runs


def held_out_inputs(source: str, run: str, count: int, image_size: int | None = None) -> Mapping[str, Any]:
    """The first held-out examples of labelled images or texts as the inputs of a run's students.

    Args:
        source: see [`~hf_curriculum_distill.tasks.images.read_images`] and
            [`~hf_curriculum_distill.tasks.classification.read_task`].
        run: with `checkpoint-STEP` folders, of classifiers of images or texts.
        count: the number of examples, at most.
        image_size: to which images are resized.

    Raises:
        OSError, ValueError: the data cannot be read, or the student reads neither images nor texts.
    """
    folder = find_checkpoints(run)[-1]
    model = load_model(folder)
    if model.main_input_name == "pixel_values":
        _, images, _ = read_images(source, image_size, heldout_images=count)
        return default_data_collator([images[index] for index in range(len(images))])
    if "SequenceClassification" not in type(model).__name__:
        raise ValueError(
            f"{folder} holds a {type(model).__name__}; --dataset is for classifiers of images and texts. Measure it "
            "while it trains, with SupervisionComplexityCallback."
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    length = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512))
    _, texts = encode_task(read_task(source), tokenizer, length, model.config.id2label, folder)
    return DataCollatorWithPadding(tokenizer)([texts[index] for index in range(min(count, len(texts)))])


def values_of(runs: Sequence[Sequence[Point]]) -> tuple[list[int], dict[str, np.ndarray]]:
    """The steps at which all runs were measured, and each target's values `[steps, runs, 3]`: with the ridge, with a
    tenth and with ten times of it."""
    steps = sorted(set.intersection(*({point.step for point in run} for run in runs)))
    at = [{point.step: point.complexity for point in run} for run in runs]
    names = [name for name in at[0][steps[0]] if all(name in run[step] for run in at for step in steps)]
    return steps, {name: np.array([[run[step][name] for run in at] for step in steps]) for name in names}


def format_complexity(runs: Sequence[Sequence[Point]]) -> str:
    """A table with a line a step, whether the order of the paper holds, the ridge's influence and the cost."""
    steps, values = values_of(runs)
    rows = [["step", *values]]
    for index, step in enumerate(steps):
        rows.append([f"{step:,}"])
        for of in values.values():
            deviation = f" ± {of[index, :, 0].std(ddof=1):.3f}" if len(runs) > 1 else ""
            rows[-1].append(f"{of[index, :, 0].mean():.3f}{deviation}")
    lines = [f"adjusted supervision complexity, mean over {len(runs)} runs", "", align(rows), ""]
    there = [name for name in ORDER if name in values]
    for higher, lower in pairwise(there):
        holds = values[higher] >= values[lower] - 1e-9
        own, tenth, tenfold = holds.sum((0, 1))
        lines.append(
            f"{higher} >= {lower}: at {own} of {holds[..., 0].size} points of a run (with a tenth of the ridge at "
            f"{tenth}, with ten times at {tenfold})"
        )
    change = max(abs(of[..., 1:] / of[..., :1] - 1).max() for of in values.values())
    seconds = [point.seconds for run in runs for point in run]
    lines.append(f"a tenth or ten times the ridge changes a value by at most {change:.1%}")
    lines.append(f"cost: {np.mean(seconds):.1f} s a point, {np.sum(seconds):.0f} s in all")
    return "\n".join(lines)


def plot_complexity(runs: Sequence[Sequence[Point]], path: str) -> Figure:
    """The values against the student's steps, as PNG at `path` and as SVG beside it; needs matplotlib.

    A line is the mean over runs, the band goes from the lowest to the highest; the axis is logarithmic where values
    differ by a factor of 20 and more. Projected hidden targets belong to other
    kernels, and are drawn on the right.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    steps, values = values_of(runs)
    layers = [name for name in values if name not in ORDER]
    figure = Figure(figsize=(10 if layers else 5.6, 4.4), dpi=150, layout="constrained")
    axes = figure.subplots(1, 2 if layers else 1, squeeze=False)[0]
    for index, (name, of) in enumerate(values.items()):
        style, color = _LOOKS.get(name) or ("-", _OF_LAYERS[index % len(_OF_LAYERS)])
        axis, own = axes[int(name in layers)], of[..., 0]
        axis.plot(steps, own.mean(1), style, color=color, label=name, marker="o", markersize=3)
        if len(runs) > 1:
            axis.fill_between(steps, own.min(1), own.max(1), color=color, alpha=0.2, linewidth=0)
    for axis, title in zip(axes, ("labels and logits", "projected hidden states"), strict=False):
        axis.set(title=title, xlabel="optimizer steps of the student")
        drawn = np.concatenate([of[..., 0].ravel() for name, of in values.items() if axis is axes[int(name in layers)]])
        if 0 < 20 * drawn.min() < drawn.max():
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(ScalarFormatter())
        else:
            axis.set_ylim(0, None)
        axis.axhline(1, color="0.7", linewidth=0.8, linestyle=":")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="0.9")
        axis.legend(frameon=False)
    axes[0].set_ylabel("adjusted supervision complexity")
    save_figure(figure, path)
    return figure
