"""Several methods on equal footing: which runs a comparison consists of, and one run's object in `results.json`."""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hf_curriculum_distill.config import METHODS, CurriculumDistillationConfig
from hf_curriculum_distill.results import write_results
from hf_curriculum_distill.trainer import CurriculumDistillationTrainer

logger = logging.getLogger(__name__)

_METRICS = ("eval_loss", "eval_accuracy", "eval_agreement", "eval_kl")


def plan_runs(
    args: CurriculumDistillationConfig,
    methods: Sequence[str],
    variants: Mapping[str, Mapping[str, Any] | None] | str | None = None,
    seeds: Sequence[int] | None = None,
) -> dict[str, list[CurriculumDistillationConfig]]:
    """The arguments of each method's runs, one a seed, in folders `<output_dir>/<method>/seed-<seed>`.

    Args:
        args: what all runs share.
        methods: names to train: methods of the library or names in `variants`.
        variants: name -> fields of `args` that differ: `{"last layer": {"layer_order": "last"}}`, or that as JSON.
        seeds: `args.seed` alone by default.

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
    """Train what [`plan_runs`] planned; say how each run ended, and keep `results.json` in `folder` up to date.

    Args:
        distil: trains the student of one run, given its arguments and its method: see [`train_student`].
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
    checkpoint if it has one. A run that is not finite is returned as that, with the error and without metrics.
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
        "samples": steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "steps": steps,
        "student_flops": spent["student_flops"],
        "teacher_flops": spent["teacher_flops"],
        "seconds": seconds,
        "finite": True,
    }
