"""A plan as text."""

from __future__ import annotations

from hf_curriculum_distill.planning.plan import Plan
from hf_curriculum_distill.report.tables import align


def format_plan(plan: Plan) -> str:
    """Write a plan as text: checks, layer map, a table of operations and time, one of memory, assumptions.

    Args:
        plan: from [`make_plan`].

    Returns:
        Lines without a final line break; the checks only, if one of them failed.
    """
    lines = [f"{outcome:5}  {name}: {detail}" for outcome, name, detail in plan.checks]
    if plan.errors:
        return "\n".join(lines)
    lines += ["", *(f"student layer {student} <- teacher layer {teacher}" for student, teacher in plan.layer_map)]
    operations = [["stage", "steps", "parameters trained", "student TFLOPs", "teacher TFLOPs", "TFLOPs", "time"]]
    memory = [["GiB at most", *(name if name != "total" else "at once" for name in plan.total["memory"])]]
    for costs in filter(None, [*plan.stages, plan.total, plan.one_shot]):
        flops = [_tera(costs[name]) for name in ("student_flops", "teacher_flops", "flops")]
        steps = f"{costs['first_step']:,}-{costs['last_step']:,}"
        trained, seconds = f"{costs['trained_parameters']:,}", _duration(costs["seconds"])
        operations.append([costs["name"], steps, trained, *flops, seconds])
        if costs is not plan.total:  # its moment is one of a stage's
            memory.append([costs["name"], *(f"{size / 2**30:,.3f}" for size in costs["memory"].values())])
    lines += ["", align(operations), "", align(memory)]
    if plan.one_shot:
        lines += ["", f"operations: {plan.total['flops'] / plan.one_shot['flops']:.3f} of one_shot's at the same steps"]
    if plan.device or plan.price is not None:
        lines += ["", _forecast(plan)]
    return "\n".join([*lines, *plan.assumptions])


def _forecast(plan: Plan) -> str:
    """One line that says how long the run takes, whether it fits, and what it costs."""
    text, device = f"forecast: {_duration(plan.total['seconds'])}", plan.device
    if device:
        needed, there = (size / 2**30 for size in (plan.total["memory"]["total"], device["memory"]))
        fits = " of" if needed <= there else ", which is more than the"
        text += f" on {device['number']} x {device['name']}, {needed:,.1f} GiB at most{fits} {there:g} of each"
    return text if plan.price is None else f"{text}; price {plan.price:,.2f}"


def _tera(flops: int) -> str:
    return f"{flops / 1e12:,.0f}" if flops >= 1e17 else f"{flops / 1e12:,.5g}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
