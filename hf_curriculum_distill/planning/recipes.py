"""What a plan takes from the recipe whose run it forecasts: the defaults of its options, and its task."""

from __future__ import annotations

import dataclasses
import runpy
from collections.abc import Collection, Mapping
from typing import Any

from hf_curriculum_distill.planning.arguments import PlanArguments, PlannedConfig

_PLANNED = {field.name: field for kind in (PlanArguments, PlannedConfig) for field in dataclasses.fields(kind)}


def recipe_defaults(path: str, given: Mapping[str, Any], gpu: str | None = None) -> dict[str, Any]:
    """Read the defaults of a recipe's options that a plan has, where they differ from the plan's.

    Args:
        path: of the recipe's script.
        given: options of the file with which the recipe will be run.
        gpu: which the run will have; recipes then compute in bfloat16, whatever this machine has.

    Returns:
        Option -> default. A recipe of texts is planned at its `max_length`, the longest that a text can be.

    Raises:
        ValueError: the recipe describes its models by options that a plan does not know.
    """
    script = runpy.run_path(path)
    if "TASK" not in script:
        raise ValueError(
            f"The models of {path} follow from options of its own, which a plan does not know; name both with "
            "--student and --teacher, and leave the recipe out."
        )
    fields = _options(script)
    defaults = {name: _default(field) for name, field in fields.items() if name in _PLANNED}
    defaults = {name: value for name, value in defaults.items() if value != _default(_PLANNED[name])}
    if gpu is not None:
        defaults["bf16"] = True
    if "max_length" in fields:
        defaults["block_size"] = given.get("max_length", _default(fields["max_length"]))
    return {"task": script["TASK"]} | defaults


def unread_options(paths: Collection[str], given: Mapping[str, Any]) -> list[str]:
    """Find the options in a file that are of recipes, and that a plan has not.

    Args:
        paths: of the recipes' scripts.
        given: the file's options.

    Returns:
        Their names, in the order of the file.
    """
    foreign = [name for name in given if name not in _PLANNED]
    known = {name for path in paths for name in _options(runpy.run_path(path))} if foreign else ()
    return [name for name in foreign if name in known]


def _options(script: Mapping[str, Any]) -> dict[str, dataclasses.Field]:
    kinds = script["RecipeArguments"], script["TrainingConfig"]
    return {field.name: field for kind in kinds for field in dataclasses.fields(kind)}


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
