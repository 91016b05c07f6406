"""Several methods on equal footing: which runs a comparison consists of, how they are trained, what each leaves.

[`compare_methods`] is what a recipe does; a recipe of its own kind calls [`plan_runs`], [`train_all`] and
[`train_student`] itself.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import transformers

from hf_curriculum_distill.config import METHODS, CurriculumDistillationConfig
from hf_curriculum_distill.options import ComparisonOptions
from hf_curriculum_distill.report.results import write_results
from hf_curriculum_distill.report.tables import format_summary
from hf_curriculum_distill.trainer import CurriculumDistillationTrainer

logger = logging.getLogger(__name__)

LABELS_ALONE = [{"label_weight": 1.0}]  # the stages of a training without a teacher, of a teacher for instance

_METRICS = ("eval_loss", "eval_accuracy", "eval_agreement", "eval_kl")


def compare_methods(
    recipe: ComparisonOptions,
    args: CurriculumDistillationConfig,
    find_teacher: Callable[..., Any],
    distil: Callable[..., dict[str, Any]],
    recipe_logger: logging.Logger,
    threshold: float | None = None,
) -> str:
    """A recipe from its options to the table: plan the runs, find the teacher, train every student.

    Args:
        recipe: the recipe's options.
        args: what all runs share.
        find_teacher: `find_teacher(recipe, args)` trains the teacher if it is not there yet, and returns what `distil`
            needs of it.
        distil: `distil(recipe, teacher, args, method)` trains the student of one run: see [`train_student`].
        recipe_logger: says what happens, on the main process only, as the logger of this module does.
        threshold: the accuracy whose cost the table states: see [`format_summary`].

    Returns:
        the table, and the command that plots it.

    Raises:
        SystemExit: the options describe no runs; it says what is wrong with them.
    """
    logging.basicConfig(format="%(message)s")
    for each in (recipe_logger, logger):
        each.setLevel(logging.INFO if args.should_log else logging.WARNING)
    transformers.utils.logging.disable_progress_bar()  # one line a run says more here than a bar a checkpoint
    try:
        runs = plan_runs(args, recipe.methods, recipe.variants, recipe.seeds)
    except (ValueError, TypeError) as error:
        raise SystemExit(str(error)) from error
    teacher = find_teacher(recipe, args)
    results = train_all(runs, partial(distil, recipe, teacher), args.output_dir)
    option = "" if threshold is None else f" --threshold {threshold:g}"
    return (
        f"{format_summary(results, threshold=threshold)}\n\n"
        f"plot: hf-curriculum-distill compare {args.output_dir}{option}"
    )


def teacher_arguments(
    args: CurriculumDistillationConfig, folder: str, max_steps: int, batch_size: int, every: int, **others: Any
) -> CurriculumDistillationConfig:
    """The arguments with which a recipe trains the teacher of its students, on labels alone.

    Args:
        args: those of the students, of which the rest is taken.
        folder: where the teacher and its checkpoints are written.
        max_steps: optimizer steps.
        batch_size: examples of a step and device.
        every: steps between two evaluations and checkpoints.
        others: fields that differ from `args`, too.
    """
    return dataclasses.replace(
        args,
        output_dir=folder,
        stages=LABELS_ALONE,
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        learning_rate=args.teacher_learning_rate,
        restart_schedule_per_stage=False,
        eval_strategy="steps",
        eval_steps=every,
        logging_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_only_model=True,
        **others,
    )


def check_kept_teacher(folder: str, facts: Mapping[str, tuple[Any, Any]]) -> None:
    """Whether the teacher of an earlier launch is the one that the options describe.

    Args:
        folder: where it was kept.
        facts: name of a fact -> what it is of the teacher there, and what the options say.

    Raises:
        SystemExit: a fact is another; it says which.
    """
    for name, (there, wanted) in facts.items():
        if there != wanted:
            raise SystemExit(
                f"{folder} holds a teacher with {name}={there}, but the options ask for {wanted}; name another folder "
                "in --teacher."
            )


def plan_runs(
    args: CurriculumDistillationConfig,
    methods: Sequence[str],
    variants: Mapping[str, Mapping[str, Any] | None] | str | None = None,
    seeds: Sequence[int] | None = None,
) -> dict[str, list[CurriculumDistillationConfig]]:
    """Which runs a comparison consists of.

    Args:
        args: what all runs share.
        methods: names to train: methods of the library or names in `variants`.
        variants: name -> fields of `args` that differ: `{"last layer": {"layer_order": "last"}}`, or that as JSON.
        seeds: `args.seed` alone by default.

    Returns:
        Name of a method -> the arguments of its runs, one a seed, with folders `<output_dir>/<method>/seed-<seed>`.

    Raises:
        ValueError: a name is no method, a field is unknown, or a value is wrong.
    """
    if isinstance(variants, str):
        try:
            variants = json.loads(variants)
        except json.JSONDecodeError as error:
            raise ValueError(f"variants is {variants!r}, which is no valid JSON ({error}).") from error
    variants = variants or {}
    known = {field.name for field in dataclasses.fields(args) if field.init} - {"seed", "output_dir"}
    for name, overrides in variants.items():
        for field in overrides or {}:
            if field not in known:
                near = difflib.get_close_matches(field, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else "."
                raise ValueError(f"variants.{name} sets {field!r}, which is no training argument{hint}")
    if len({name.replace(" ", "_") for name in methods}) < len(set(methods)):
        raise ValueError(f"methods are {', '.join(methods)}; two of these would share a folder, so rename one.")
    runs: dict[str, list[CurriculumDistillationConfig]] = {}
    for method in dict.fromkeys(methods):
        if method not in variants and method not in METHODS:
            names = ", ".join(dict.fromkeys([*variants, *METHODS]))
            raise ValueError(f"methods names {method!r}; use {names}, or describe it in variants.")
        own = {"method": method} if method in METHODS else {}
        folder = os.path.join(args.output_dir, method.replace(" ", "_"))
        runs[method] = [
            dataclasses.replace(
                args,
                **own | dict(variants.get(method) or {}),
                seed=seed,
                output_dir=os.path.join(folder, f"seed-{seed}"),
            )
            for seed in ([args.seed] if seeds is None else seeds)
        ]
    return runs


def train_all(
    runs: Mapping[str, Sequence[CurriculumDistillationConfig]],
    distil: Callable[[CurriculumDistillationConfig, str], dict[str, Any]],
    folder: str,
) -> list[dict[str, Any]]:
    """Train one run after another, log how each ended, and keep `results.json` up to date.

    Args:
        runs: name of a method -> the arguments of its runs, as [`plan_runs`] returns them.
        distil: trains the student of one run, given its arguments and the name of its method: see [`train_student`].
        folder: where `results.json` is written.

    Returns:
        The objects of `results.json`.
    """
    results: list[dict[str, Any]] = []
    for method, seeds in runs.items():
        for args in seeds:
            results.append(result := distil(args, method))
            if args.should_save:
                write_results(folder, results)
                logger.info("%s, seed %d: %s", method, args.seed, _describe(result))
    return results


def _describe(result: Mapping[str, Any]) -> str:
    if not result["finite"]:
        return result["error"]
    return f"accuracy {result['eval_accuracy']:.4f} after {result['samples']:,} examples, {result['seconds']:.0f} s"


def train_student(trainer: CurriculumDistillationTrainer, method: str) -> dict[str, Any]:
    """Train, evaluate and save a student; returns its object in `results.json`.

    With `args.resume_from_checkpoint` training goes on from that folder or, for any other value, from the run's last
    checkpoint if it has one. A run whose loss or weights stop being finite has `finite: false` and the error in its
    object, and no metrics.

    Args:
        trainer: holds the student.
        method: the name of the run's method in `results.json`.
    """
    args = trainer.args
    run = {"method": method, "seed": args.seed, "path": args.output_dir}
    start = time.monotonic()
    try:
        resumed = args.resume_from_checkpoint
        trainer.train(resume_from_checkpoint=resumed if resumed is None or os.path.isdir(resumed) else True)
        seconds = time.monotonic() - start
        metrics = trainer.evaluate()
    except FloatingPointError as error:
        return run | {"finite": False, "error": str(error)}
    trainer.save_model()
    trainer.save_state()
    spent = next(entry for entry in reversed(trainer.state.log_history) if "student_flops" in entry)
    steps = trainer.state.global_step
    return run | {
        **{name: metrics[name] for name in _METRICS if name in metrics},
        "samples": num_examples(args, steps),
        "steps": steps,
        "student_flops": spent["student_flops"],
        "teacher_flops": spent["teacher_flops"],
        "seconds": seconds,
        "finite": True,
    }


def num_examples(args: CurriculumDistillationConfig, steps: int) -> int:
    """Examples that training takes in a number of optimizer steps, on all devices together."""
    return steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
