"""Which runs a launch of a recipe consists of: each method with each seed, and where each is written."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from dataclasses import dataclass
from typing import Any

from hf_curriculum_distill.config import METHODS, UNCACHED_METHODS, CurriculumDistillationConfig
from hf_curriculum_distill.lines import one_line
from hf_curriculum_distill.options import ComparisonOptions
from hf_curriculum_distill.report.checks import check_output
from hf_curriculum_distill.report.results import earlier_results


@dataclass(frozen=True)
class Run:
    """One student of a comparison.

    Args:
        method: its name in tables and in `results.json`: a method of the library, or the name of a variant.
        recipe: the recipe's options, with what the variant changes.
        args: the training arguments, likewise, with the run's own seed and folder.
    """

    method: str
    recipe: ComparisonOptions
    args: CurriculumDistillationConfig


def planned_or_exit(recipe: ComparisonOptions, args: CurriculumDistillationConfig) -> list[Run]:
    """[`plan_runs`] for a command line, which ends with one line if the options describe no runs, or if these would
    be written where they cannot or should not be: see [`check_output`]."""
    try:
        runs = plan_runs(recipe, args)
        check_output(args, [run.args.output_dir for run in runs], recipe.overwrite_output_dir)
    except (ValueError, TypeError, OSError) as error:
        raise SystemExit(one_line(error)) from error
    return runs


def plan_runs(recipe: ComparisonOptions, args: CurriculumDistillationConfig) -> list[Run]:
    """Which runs a comparison consists of: each method of `recipe.methods` with each seed.

    Args:
        recipe: its `variants` set options of the recipe or training arguments: `{"last layer": {"layer_order":
            "last"}}`, or that as JSON; its `seeds` are `args.seed` alone by default.
        args: what all runs share.

    Returns:
        The runs, method by method, in folders `<output_dir>/<method>/seed-<seed>`; a single one in `output_dir` itself,
        unless that holds other runs, which it joins. A run that is in `output_dir` itself stays there.

    Raises:
        ValueError: a name is no method, a field is unknown or shared by all runs, a value is wrong or would be
            ignored, or the `results.json` that is there is damaged.
    """
    methods, variants = list(dict.fromkeys(recipe.methods)), recipe.variants or {}
    if isinstance(variants, str):
        try:
            variants = json.loads(variants)
        except json.JSONDecodeError as error:
            raise ValueError(f"variants is {variants!r}, which is no valid JSON ({error}).") from error
    of_the_launch = {"methods", "variants", "seeds", "overwrite_output_dir"}
    options = {field.name for field in dataclasses.fields(recipe)} - of_the_launch
    arguments = {field.name for field in dataclasses.fields(args) if field.init} - {"seed", "output_dir"}
    for name, changes in variants.items():
        for field in changes or {}:
            if field in recipe.shared_by_runs:
                raise ValueError(
                    f"variants.{name} sets {field!r}, which all runs of a launch share; set it for all of them, in "
                    "another --output_dir."
                )
            if field not in options | arguments:
                near = difflib.get_close_matches(field, options | arguments, n=1)
                hint = f"; did you mean {near[0]}?" if near else "."
                raise ValueError(f"variants.{name} sets {field!r}, which is no option of a run{hint}")
    if len({name.replace(" ", "_") for name in methods}) < len(methods):
        raise ValueError(f"methods are {', '.join(methods)}; two of these would share a folder, so rename one.")
    named = [method for method in methods if "stages" not in (variants.get(method) or {}) and method in METHODS]
    if args.stages is not None and len(named) > 1:
        raise ValueError(
            f"stages says what is trained, but methods names {', '.join(named)}, which would all train that; give "
            "variants stages of their own."
        )
    runs = []
    for method in methods:
        if method not in variants and method not in METHODS:
            names = ", ".join(dict.fromkeys([*variants, *METHODS]))
            raise ValueError(f"methods names {method!r}; use {names}, or describe it in variants.")
        changes = ({"method": method} if method in METHODS else {}) | dict(variants.get(method) or {})
        if changes.get("method", args.method) in UNCACHED_METHODS:
            changes.setdefault("teacher_cache", None)
        own = dataclasses.replace(recipe, **{name: changes.pop(name) for name in options & changes.keys()})
        folder = os.path.join(args.output_dir, method.replace(" ", "_"))
        for seed in [args.seed] if recipe.seeds is None else recipe.seeds:
            place = {"seed": seed, "output_dir": os.path.join(folder, f"seed-{seed}")}
            runs.append(Run(method, own, dataclasses.replace(args, **changes, **place)))
    if runs and args.method not in {type(args).method, *(run.args.method for run in runs)}:
        raise ValueError(
            f"method is {args.method!r}, but methods asks for {', '.join(methods)} alone; use --methods {args.method}."
        )
    others = earlier_results(args.output_dir, [args.output_dir])
    there = earlier_result(args.output_dir, args.output_dir)
    for index, run in enumerate(runs):
        is_there = there and (there["method"], there.get("seed", run.args.seed)) == (run.method, run.args.seed)
        if is_there or (len(runs) == 1 and not others and not there):
            runs[index] = dataclasses.replace(run, args=dataclasses.replace(run.args, output_dir=args.output_dir))
    if len(runs) > 1 and args.push_to_hub:
        raise ValueError(f"push_to_hub pushes one student, but methods and seeds ask for {len(runs)}; push one by one.")
    return runs


def earlier_result(folder: str, run: str) -> dict[str, Any] | None:
    """What the `results.json` of a folder says of the run in another, or in this folder itself."""
    others = earlier_results(folder, [run])
    return next((result for result in earlier_results(folder, []) if result not in others), None)
