"""A plan: a run's checks and costs, found before it starts."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.lines import printable
from hf_curriculum_distill.planning.arguments import PlanArguments
from hf_curriculum_distill.planning.checks import (
    check_batch,
    check_layer_map,
    check_steps,
    check_vocabulary,
    check_weights,
    load_tokenizer,
)
from hf_curriculum_distill.planning.costs import RunCosts, add_up
from hf_curriculum_distill.planning.gpus import GPUS
from hf_curriculum_distill.planning.models import build_models, find_size, find_teachers
from hf_curriculum_distill.planning.optimizer import OptimizerMemory
from hf_curriculum_distill.planning.rate import find_rate
from hf_curriculum_distill.stages import Stage, StageScheduler, matched_pairs
from hf_curriculum_distill.teachers.teacher import has_head


@dataclass
class Plan:
    """A run's checks and, if none failed, its costs.

    Args:
        checks: `(outcome, name, detail)` each; the outcome is `ok`, `skip` (there was nothing to check) or `error`.
        layer_map: `(student layer, teacher layer)`.
        stages: what each costs: see [`~hf_curriculum_distill.planning.costs.RunCosts.of_stages`].
        total: the same of all stages.
        one_shot: the same of a run that matches only logits in as many steps; empty without a teacher or logits.
        device: the GPU that was named, how many of it, and the bytes of memory of each; empty if none was named.
        price: of the run, for the price of a device's hour that was given.
        assumptions: lines that say what was counted and how.
    """

    checks: list[tuple[str, str, str]] = field(default_factory=list)
    layer_map: list[tuple[int, int]] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    total: dict[str, Any] = field(default_factory=dict)
    one_shot: dict[str, Any] = field(default_factory=dict)
    device: dict[str, Any] = field(default_factory=dict)
    price: float | None = None
    assumptions: list[str] = field(default_factory=list)

    @property
    def errors(self) -> list[str]:
        """`name: detail` of each check that failed."""
        return [f"{name}: {detail}" for outcome, name, detail in self.checks if outcome == "error"]

    def check(self, name: str, examine: Callable, *args: Any) -> Any:
        """Run a check and note its outcome.

        Args:
            name: of the check.
            examine: called with `args`; it returns a detail and a result (None: there is nothing to check), or raises.

        Returns:
            The result; None after an error.
        """
        try:
            detail, result = examine(*args)
            outcome = "skip" if result is None else "ok"
        except Exception as error:  # of any kind: transformers fails in many ways on damaged files
            known = isinstance(error, (ValueError, OSError))
            detail, result, outcome = f"{error}" if known else f"{type(error).__name__}: {error}", None, "error"
        self.checks.append((outcome, name, printable(textwrap.shorten(detail, 1000, placeholder=" ..."))))
        return result


def make_plan(options: PlanArguments, args: CurriculumDistillationConfig) -> Plan:
    """Check a run and add up what it will cost. No weights are read or made, however large the models are.

    Args:
        options: models, data and machine.
        args: the run's configuration; on a machine without the run's accelerator, a [`PlannedConfig`].

    Returns:
        The plan. Whatever is wrong with the run is in its `errors`.
    """
    plan = Plan()
    if options.gpu is not None:
        plan.device = plan.check("machine", _find_device, options, args) or {}
    tokenizer = plan.check("tokenizer", load_tokenizer, options)
    run = plan.check("models", build_models, options, args, tokenizer)
    if run is None:
        return plan
    plan.check("vocabulary", check_vocabulary, options, run, tokenizer)
    if run.teacher is not None and find_size(options.teacher_source) is None:
        plan.check("teacher's weights", check_weights, find_teachers(options, args), run)
    plan.check("batch", check_batch, options, run)
    stages = plan.check("layer map", check_layer_map, run)
    scheduler = stages and plan.check("steps", check_steps, stages, options, args)
    if plan.errors:
        return plan
    rate, assumption = find_rate(options, args)
    costs = RunCosts(run, OptimizerMemory(args), options.num_processes, rate)
    plan.stages = plan.check("dry run", _run_dry, costs, scheduler, args.method == "online") or []
    if plan.errors:
        return plan
    plan.layer_map, plan.total = matched_pairs(stages), add_up("total", plan.stages)
    if run.teacher is not None and (args.pooling is not None or has_head(run.student.model)):
        alone = StageScheduler([Stage(kl_weight=1.0, label_weight=args.label_loss_weight)], args.max_steps)
        plan.one_shot = add_up("one_shot", costs.of_stages(alone))
    if options.price_per_hour is not None:
        plan.price = plan.total["seconds"] / 3600 * options.num_processes * options.price_per_hour
    plan.assumptions = [assumption, *_state_assumptions(args, costs.optimizer.untried)]
    return plan


def _find_device(options: PlanArguments, args: CurriculumDistillationConfig) -> tuple[str, dict[str, Any]]:
    if args.use_cpu:
        raise ValueError(f"gpu is {options.gpu!r}, but use_cpu is True; leave one of them out.")
    gpu, number = GPUS[options.gpu], options.num_processes
    return f"{number} x {gpu.name}", {"name": gpu.name, "number": number, "memory": gpu.memory}


def _run_dry(costs: RunCosts, scheduler: StageScheduler, online: bool) -> tuple[str, list[dict[str, Any]]]:
    of_stages = costs.of_stages(scheduler, online)
    return f"{len(of_stages)} stages", of_stages


def _state_assumptions(args: CurriculumDistillationConfig, untried: str | None) -> list[str]:
    assumptions = [
        "operations: matrix products of all processes, a backward pass as two forward; no padding, no evaluations",
        "memory: of one process; each column the most it ever is, the total that of one moment; with the teacher its "
        "projections; without sharding, DDP's buckets, fragmentation and the device's own",
    ]
    if args.measures_order:
        assumptions.append(
            "layer_order='complexity': counted as a stage for each layer, lowest first; which layers are matched when "
            "is measured before the first step, and what that costs is not counted"
        )
    if untried:
        assumptions.append(f"optimizer: {args.optim.value} is counted as Adam, for it cannot be tried here: {untried}")
    if args.teacher_cache is not None:
        assumptions.append("teacher_cache: not counted; the data say what it saves, before training starts")
    return assumptions
