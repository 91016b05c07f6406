"""A page that compares finished runs: curves, tables, stages, and the settings that differ."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_curriculum_distill.report.curves import shared_metrics
from hf_curriculum_distill.report.figures import (
    COSTS,
    choose_looks,
    finite_curves,
    name_method,
    name_metric,
    panels,
    reference_lines,
    sentence,
)
from hf_curriculum_distill.report.page import figure, heading, legend, make_page, paragraph, table
from hf_curriculum_distill.report.page import panels as side_by_side
from hf_curriculum_distill.report.results import read_record, require, settings_that_differ
from hf_curriculum_distill.report.tables import list_results, summarize_methods
from hf_curriculum_distill.resuming.record import FILE_NAME as RECORD_FILE

PAGE_FILE = "comparison.html"

_CURVES = ("eval_accuracy", "eval_agreement", "eval_kl", "eval_loss")  # that are drawn where all runs have them


def compare_on_page(
    results: Sequence[Mapping[str, Any]],
    metric: str = "eval_accuracy",
    threshold: float | None = None,
    baseline: str = "one_shot",
    lines: Mapping[str, float] | None = None,
) -> bytes:
    """The page, which holds all that it shows; curves need matplotlib.

    Args:
        results: objects of `results.json`: see [`read_results`].
        metric, threshold, baseline: see [`format_summary`].
        lines: see [`plot_comparison`].

    Raises:
        ValueError: a run was not evaluated by this metric, or its files are damaged.
    """
    finite = [result for result in results if result["finite"]]
    notes, rows = summarize_methods(results, metric, threshold, baseline)
    titles = [name_metric(metric) if title == metric else title for title in rows[0]]
    rows = [titles, *([name_method(first), *others] for first, *others in rows[1:])]
    notes = [note.replace(metric, name_metric(metric)).replace("one_shot", "one-shot") for note in notes]
    parts = [table(rows), *(paragraph(sentence(note)) for note in notes)]
    if finite and find_spec("matplotlib"):
        parts += _curves(finite, metric, baseline, lines)
    parts += [heading("Runs"), table(_runs(results))]
    if any("error" in result for result in results):
        parts += [paragraph(f"{name_method(r['method'])}: {r['error']}") for r in results if "error" in r]
    if stages := _stages(finite):
        parts += [heading("Stages"), table(stages)]
        parts.append(paragraph("Weights of the losses; layers are numbers of blocks, from 1, and 0 is the embeddings."))
    parts += [heading("Settings that differ"), *_differences(finite)]
    methods = ", ".join(dict.fromkeys(name_method(result["method"]) for result in results))
    return make_page("Comparison of runs", methods, parts)


def _curves(
    finite: Sequence[Mapping[str, Any]], metric: str, baseline: str, lines: Mapping[str, float] | None
) -> Iterable[str]:
    from matplotlib.colors import to_hex

    shared = shared_metrics(finite)
    methods = finite_curves(finite, metric)
    looks = choose_looks(list(methods), baseline)
    names = [
        (name_method(m) + (f" ({len(c)} runs: mean and range)" if len(c) > 1 else ""), m) for m, c in methods.items()
    ]
    key = legend([(name, style, to_hex(color)) for name, m in names for style, color in [looks[m]]])
    for name in dict.fromkeys([metric, *(n for n in _CURVES if n in shared)]):
        drawn = reference_lines(finite, name, lines if name == metric else None)
        yield heading(sentence(name_metric(name)))
        yield key
        drawings = zip(panels(finite, name, baseline, drawn), COSTS, strict=True)
        yield side_by_side([figure(svg, f"{name_metric(name)} by {cost}") for svg, cost in drawings])
    if any(curve.layer_stages for curves in methods.values() for curve in curves):
        yield paragraph(
            "A strip above a plot shows the stages that match hidden states only. Dots are hollow where no stage has "
            "trained the head yet, so that what it predicts says nothing."
        )


def _runs(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    titles, *rows = list_results(results)
    rows = [[name_method(row[0]), *row[1:]] for row in rows]
    ends = [[str(result.get("seed", "-")), result["path"]] for result in results]
    return [[*titles, "seed", "folder"], *([*row, *end] for row, end in zip(rows, ends, strict=True))]


def _stages(finite: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The stages of the first run of each method; empty if no run has any."""
    rows, seen = [["method", "stage", "steps", "student ← teacher layers", "hidden", "logits", "labels"]], set()
    for result in finite:
        record, path = read_record(Path(result["path"])), Path(result["path"], RECORD_FILE)
        first = 1
        for stage in [] if result["method"] in seen else record["stages"]:
            require(path, stage, "until", "kl_weight", "label_weight")
            end = stage["until"] or record.get("max_steps") or result["steps"]
            pairs = stage.get("hidden") or []
            layers = ", ".join(f"{pair[0]} ← {pair[1]}" for pair in pairs) or "-"
            weights = [stage.get("hidden_weight", "-") if pairs else "-", stage["kl_weight"], stage["label_weight"]]
            name = str(stage.get("name", "-"))
            rows.append([name_method(result["method"]), name, f"{first:,} to {end:,}", layers, *map(_short, weights)])
            first = end + 1
        seen.add(result["method"])
    return rows if len(rows) > 1 else []


def _differences(finite: Sequence[Mapping[str, Any]]) -> list[str]:
    differing = settings_that_differ(finite)
    if not differing:
        return [paragraph("None that is recorded." if finite else "No run is finite.")]
    names = [name_method(r["method"]) + (f", seed {r['seed']}" if "seed" in r else "") for r in finite]
    kept = [index for index, name in enumerate(names) if names.index(name) == index]
    rows = [["setting", *(names[index] for index in kept)]]
    rows += [[name, *(_short(values[index]) for index in kept)] for name, values in differing.items()]
    recorded = all("arguments" in read_record(Path(result["path"])) for result in finite)
    note = [] if recorded else [paragraph("A run whose settings are not recorded has only those of its model.")]
    return [table(rows), *note]


def _short(value: Any) -> str:
    text = "-" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 160 else f"{text[:157]}..."
