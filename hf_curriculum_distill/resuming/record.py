"""`curriculum.json`: what a run trains; saved with every student and compared when a run is resumed."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import reprlib
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
import transformers
from torch.utils.data import IterableDataset
from transformers.trainer_utils import has_length

from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.files import replacing
from hf_curriculum_distill.projections import ProjectionBank
from hf_curriculum_distill.stages import LayerPair, Stage, StageScheduler
from hf_curriculum_distill.teachers.teacher import Teacher

FILE_NAME = "curriculum.json"
FORMAT_VERSION = 2

# Settings, other than the stages, that change what is learnt.
_SETTINGS = (
    "temperature",
    "divergence",
    "hidden_loss",
    "pooling",
    "label_smoothing_factor",
    "class_weights",
    "teacher_entropy_threshold",
    "train_prefix",
    "freeze_matched_layers",
    "freeze_embeddings_in_layer_stages",
    "finished_layer_rate",
    "carry_optimizer",
    "hidden_positions",
    "layer_stack",
    "standardize_targets",
    "restart_schedule_per_stage",
    "stage_warmup_ratio",
    "attn_implementation",
    "teacher_schedule",
    "teacher_learning_rate",
)

# What a record that lacks a setting, among its arguments too, stands for: it was written before there was a choice.
_ONCE_FIXED = {
    "hidden_loss": "mse",
    "pooling": None,
    "freeze_embeddings_in_layer_stages": False,
    "finished_layer_rate": 1.0,
    "carry_optimizer": True,
    "attn_implementation": None,
    "teacher_attention": None,
    "class_weights": None,
    "teacher_entropy_threshold": None,
    "layer_stack": "encoder",
}

# Prefixes of the arguments that say where, when and how a run reads, writes and evaluates, but not what it learns; and
# the names of others.
_NO_SETTINGS = (
    "output_dir", "log_", "logging_", "run_name", "report_to", "disable_tqdm", "trackio_", "save_", "push_to_hub",
    "hub_", "debug", "eval_", "do_", "per_device_eval_", "prediction_loss_", "batch_eval_", "include_",
    "bf16_full_", "fp16_full_", "dataloader_num_", "dataloader_pin_", "dataloader_persistent_",
    "dataloader_prefetch_", "dataloader_multi", "dataloader_in_", "ddp_", "local_rank", "use_cpu",
    "full_determinism", "skip_memory_", "torch_empty_cache_", "logit_chunk_", "resume_from_", "restore_callback_",
    "ignore_data_", "enable_jit_", "seed", "data_seed",
)  # fmt: skip
_NO_SETTING_EITHER = ("project", "teacher_cache")

# What must not change for a resumed run to equal one that was never interrupted.
_FIXED = ("method", "max_steps", "stages", "settings", "teacher", "base_model", "projection_matrices", "cached_logits")
_MAY_MOVE = ("teacher.name", "teacher.revision")  # the same weights under another name are the same teacher
_FIXED_DATA = ("samples_per_step", "data")  # must not change if the batches that were trained on are skipped
_ACCUMULATION = "gradient_accumulation_steps"  # may change, for the most part

# What every record must hold, and what that of a complete checkpoint must hold, too; `[x]` is a list of x.
_FIELDS = {"method": str, "max_steps": int, "stages": [dict], "settings": dict, "data": dict}
_FIELDS |= {"samples_per_step": int, "step": int}
_CHECKPOINT_FIELDS = {"epoch": int, "batches": int, "files": dict}
_CHECKPOINT_FIELDS |= {"unlogged": {"total_loss": float, "first_step": int, "terms": [str], "processes": [[float]]}}
_CHECKPOINT_FIELDS |= {"student_flops": float, "teacher_flops": float, "flop_rates": dict}

_KINDS = {int: "whole number", float: "number", str: "string", list: "list", dict: "dictionary"}

_short = reprlib.Repr()  # of values, for a damaged file may hold huge ones
_short.maxlevel, _short.maxdict, _short.maxlist, _short.maxstring, _short.maxother = 6, 30, 30, 200, 200


def make_record(
    args: CurriculumDistillationConfig,
    stages: StageScheduler,
    teacher: Teacher | None,
    bank: ProjectionBank | None,
    **progress: Any,
) -> dict[str, Any]:
    """Describe what a run trains, in plain JSON values.

    Args:
        args: of the run.
        stages: with the resolved number of steps.
        teacher: or None.
        bank: or None.
        progress: further entries: the data, and how far the run has come.

    Returns:
        The content of `curriculum.json`, without its format version.
    """
    return {
        "method": args.method if args.stages is None else "stages",
        "max_steps": stages.max_steps,
        "stages": [{"name": stage.name, **dataclasses.asdict(stage)} for stage in stages.stages],
        "settings": {name: getattr(args, name) for name in _SETTINGS}
        | {"teacher_attention": (args.teacher_model_init_kwargs or {}).get("attn_implementation")},
        "seed": args.seed,
        "data_seed": args.data_seed,
        "arguments": _plain_settings(args),
        "teacher": teacher and teacher.origin,
        "projection_matrices": bank and bank.matrix_fingerprint,
        "projection_bank": bank and bank.fingerprint,
        "cached_logits": None if args.teacher_cache is None else args.teacher_cache_logits or "all",
        **progress,
        "versions": {
            "hf_curriculum_distill": importlib.metadata.version("hf_curriculum_distill"),
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
    }


def _plain_settings(args: CurriculumDistillationConfig) -> dict[str, Any]:
    """The arguments that distinguish runs, other than seeds; those that are not plain JSON values are left out."""
    settings = {}
    for name, value in args.to_dict().items():
        if not name.startswith(_NO_SETTINGS) and name not in _NO_SETTING_EITHER:
            with suppress(TypeError, ValueError):
                settings[name] = json.loads(json.dumps(value))
    return settings


def describe_data(args: CurriculumDistillationConfig, dataset: Any, seed: int) -> dict[str, Any]:
    """Describe what decides which examples a step gets, and what is drawn for them (masks, augmentation).

    Args:
        args: of the run.
        dataset: that it trains on.
        seed: of the order.
    """
    facts = {"num_examples": len(dataset) if has_length(dataset) else None, "seed": seed}
    if isinstance(dataset, IterableDataset):  # each worker reads a part of it and has a random state of its own
        return facts | {"dataloader_num_workers": args.dataloader_num_workers}
    return facts | {name: getattr(args, name) for name in ("train_sampling_strategy", "dataloader_drop_last")}


def write_record(folder: str, record: Mapping[str, Any]) -> None:
    """Write `curriculum.json` into a folder, completely or not at all."""
    with replacing(os.path.join(folder, FILE_NAME)) as path, open(path, "w", encoding="utf-8") as file:
        json.dump({"format_version": FORMAT_VERSION, **record}, file, indent=2)
        file.write("\n")


def read_record(folder: str) -> dict[str, Any]:
    """Read `curriculum.json` from a folder.

    Args:
        folder: of a student or a checkpoint.

    Returns:
        What [`make_record`] made and, in a complete checkpoint, the sizes of its `files`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged or incomplete, or has another format version.
    """
    path = os.path.join(folder, FILE_NAME)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{folder} has no {FILE_NAME}, so it is no checkpoint of a distillation run; resume from one that is, or "
            "load its weights into the student and start anew."
        )
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file, parse_float=_finite, parse_constant=_finite)
        _check(record, {"format_version": int})
        version = record["format_version"]
        if version == FORMAT_VERSION:
            _check(record, _FIELDS | (_CHECKPOINT_FIELDS if "files" in record else {}))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a readable run record: {error}; resume from another checkpoint.") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version}, this library reads {FORMAT_VERSION}.")
    return record


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def _check(value: Any, kind: Any, name: str = "the whole") -> None:
    """Raise a `ValueError` that says what is wrong with a value, unless it is of the kind: see `_FIELDS`."""
    expected = type(kind) if isinstance(kind, dict | list) else kind
    types = (int, float) if expected is float else expected
    if not isinstance(value, types) or isinstance(value, bool) or (expected is int and value < 0):
        raise ValueError(f"{name} is {_short.repr(value)}, not a {_KINDS[expected]}")
    for key, inner in kind.items() if isinstance(kind, dict) else ():
        if key not in value:
            raise ValueError(f"{key!r} is missing")
        _check(value[key], inner, key)
    for item in value if isinstance(kind, list) else ():
        _check(item, *kind, f"one of {name}")


def recorded_groups(record: Mapping[str, Any], folder: str) -> list[tuple[LayerPair, ...]]:
    """The layer pairs of each layer stage of a run with `layer_order="complexity"`, which were measured at its start.

    Args:
        record: of a checkpoint.
        folder: that it is in.

    Raises:
        ValueError: the run had another layer order, or the record is damaged.
    """
    order = _arguments(record).get("layer_order")
    if order != "complexity" or record["method"] == "stages":
        raise ValueError(
            f"{folder} was written by a run whose stages were not chosen by layer_order='complexity', but "
            f"{_short.repr(order)}; resume with the settings it was started with, or start a new run in another "
            "output_dir."
        )
    try:
        stages = [
            Stage(**{name: value for name, value in fields.items() if name != "name"}) for fields in record["stages"]
        ]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder} has a damaged {FILE_NAME}: {error}; resume from another checkpoint.") from error
    return [stage.hidden for stage in stages if not stage.needs_logits]


def check_resumable(saved: Mapping[str, Any], current: Mapping[str, Any], folder: str, same_data: bool = True) -> None:
    """Check that a run may go on from a checkpoint.

    Args:
        saved: the checkpoint's record.
        current: that of the run.
        folder: of the checkpoint.
        same_data: whether the order of the data has to be the same, too.

    Raises:
        ValueError: something changed since the checkpoint was written; says what, from what, to what.
    """
    saved, current = (record | {"settings": _settings(record)} for record in (saved, current))
    changes = []
    for name in _FIXED + _FIXED_DATA * same_data:
        changes += _differences(name, saved.get(name), json.loads(json.dumps(current.get(name))))
    data = current.get("data", {})
    drops = data.get("dataloader_drop_last") and data["num_examples"] % current["samples_per_step"]
    if same_data and (drops or data.get("dataloader_num_workers", 0) > 1):
        # what is dropped follows from the micro-batch; and each worker makes whole ones, of its part of a stream
        now = _arguments(current).get(_ACCUMULATION)
        changes += _differences(_ACCUMULATION, _arguments(saved).get(_ACCUMULATION, now), now)
    if changes:
        raise ValueError(
            f"{folder} was written by a run with other settings: {'; '.join(changes)}. Resume with the settings it was "
            "started with, or start a new run in another output_dir."
        )


def resumed_at(record: Mapping[str, Any], accumulation: int, folder: str) -> tuple[int, int]:
    """Where a checkpoint's run goes on reading a stream, whose batches may be accumulated otherwise than before.

    Args:
        record: of the checkpoint.
        accumulation: the number of micro-batches of a step now.
        folder: of the checkpoint.

    Returns:
        the number of the pass over the stream, from 0, and of the micro-batches of now that it skips.

    Raises:
        ValueError: what was read is no whole number of steps, so that it can't be counted in other micro-batches.
    """
    epoch, batches, before = record["epoch"], record["batches"], _arguments(record).get(_ACCUMULATION, accumulation)
    if before == accumulation:
        return epoch, batches
    if not isinstance(before, int) or before < 1 or batches % before:
        raise ValueError(
            f"{folder} was written after {batches} micro-batches of a stream, which are no whole number of steps of "
            f"{_short.repr(before)}; resume with the {_ACCUMULATION} that it was written with, or from another "
            "checkpoint."
        )
    return epoch, batches // before * accumulation


def _settings(record: Mapping[str, Any]) -> dict[str, Any]:
    known = {name: value for name, value in _arguments(record).items() if name in _ONCE_FIXED}
    return _ONCE_FIXED | known | record.get("settings", {})


def _arguments(record: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a run; none if its record was written before they were in it, or is damaged."""
    arguments = record.get("arguments")
    return arguments if isinstance(arguments, dict) else {}


def _differences(name: str, saved: Any, current: Any) -> list[str]:
    if isinstance(saved, dict) and isinstance(current, dict):
        keys = {key: f"{name}.{key if key.isidentifier() else _short.repr(key)}" for key in sorted({*saved, *current})}
        return [d for key, inner in keys.items() for d in _differences(inner, saved.get(key), current.get(key))]
    if saved == current or name in _MAY_MOVE:
        return []
    return [f"{name} changed from {_short.repr(saved)} to {_short.repr(current)}"]
