"""`curriculum.json`: what a run trains, written beside every student, compared on resume."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
import transformers

from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.projections import ProjectionBank
from hf_curriculum_distill.stages import StageScheduler
from hf_curriculum_distill.teachers import FrozenTeacher

FILE_NAME = "curriculum.json"
FORMAT_VERSION = 1

# Settings that change what is learnt, beside the stages themselves.
_SETTINGS = (
    "temperature",
    "divergence",
    "label_smoothing_factor",
    "train_prefix",
    "freeze_matched_layers",
    "hidden_positions",
    "standardize_targets",
    "restart_schedule_per_stage",
    "stage_warmup_ratio",
    "teacher_schedule",
    "teacher_learning_rate",
)

# How the names of arguments begin that say where, when and by what means a run reads, writes and evaluates, not what it
# learns; and these themselves.
_NO_SETTINGS = (
    *(
        "output_dir",
        "log_",
        "logging_",
        "run_name",
        "report_to",
        "disable_tqdm",
        "trackio_",
        "save_",
        "push_to_hub",
        "hub_",
        "debug",
    ),
    *("eval_", "do_", "per_device_eval_", "prediction_loss_", "batch_eval_", "include_", "bf16_full_", "fp16_full_"),
    *("dataloader_num_", "dataloader_pin_", "dataloader_persistent_", "dataloader_prefetch_", "dataloader_multi"),
    *("dataloader_in_", "ddp_", "local_rank", "use_cpu", "full_determinism", "skip_memory_", "torch_empty_cache_"),
    *("logit_chunk_", "resume_from_", "restore_callback_", "ignore_data_", "enable_jit_", "seed", "data_seed"),
)
_NO_SETTING_EITHER = ("project", "teacher_cache")

# What must be the same for a resumed run to equal one that was never interrupted.
_FIXED = ("method", "max_steps", "stages", "settings", "teacher", "base_model", "projection_matrices", "cached_logits")
_MAY_MOVE = ("teacher.name", "teacher.revision")  # the same weights by another name are the same teacher


def make_record(
    args: CurriculumDistillationConfig,
    stages: StageScheduler,
    teacher: FrozenTeacher | None,
    bank: ProjectionBank | None,
    **progress: Any,
) -> dict[str, Any]:
    """What a run trains, as plain JSON values; `progress` is what changes while it does."""
    return {
        "method": args.method if args.stages is None else "stages",
        "max_steps": stages.max_steps,
        "stages": [{"name": stage.name, **dataclasses.asdict(stage)} for stage in stages.stages],
        "settings": {name: getattr(args, name) for name in _SETTINGS},
        "seed": args.seed,
        "data_seed": args.data_seed,
        "arguments": _plain_settings(args),
        "teacher": teacher and {name: getattr(teacher, name) for name in ("name", "revision", "fingerprint")},
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
    """The arguments that tell a run from others but for its seed; what is no plain JSON value is left out."""
    settings = {}
    for name, value in args.to_dict().items():
        if not name.startswith(_NO_SETTINGS) and name not in _NO_SETTING_EITHER:
            with suppress(TypeError, ValueError):
                settings[name] = json.loads(json.dumps(value))
    return settings


def write_record(folder: str, record: Mapping[str, Any]) -> None:
    """Write `curriculum.json` into a folder, whole or not at all."""
    path = os.path.join(folder, FILE_NAME)
    with open(f"{path}.partial", "w", encoding="utf-8") as file:
        json.dump({"format_version": FORMAT_VERSION, **record}, file, indent=2)
        file.write("\n")
    os.replace(f"{path}.partial", path)


def read_record(folder: str) -> dict[str, Any]:
    """Read `curriculum.json` from a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged or of another format.
    """
    path = os.path.join(folder, FILE_NAME)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{folder} has no {FILE_NAME}, so it is no checkpoint of a distillation run; resume from one that is, or "
            "load its weights into the student and start anew."
        )
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
        version = record["format_version"]
        if version == FORMAT_VERSION:
            _ = record["step"], record["stages"], record["settings"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a readable run record ({error}); resume from another checkpoint.") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version}, this library reads {FORMAT_VERSION}.")
    return record


def check_resumable(saved: Mapping[str, Any], current: Mapping[str, Any], folder: str) -> None:
    """Raise a `ValueError` that names what changed, from what to what, since a checkpoint was written."""
    changes = []
    for name in _FIXED:
        changes += _differences(name, saved.get(name), json.loads(json.dumps(current.get(name))))
    if changes:
        raise ValueError(
            f"{folder} was written by a run with other settings: {'; '.join(changes)}. Resume with the settings it was "
            "started with, or start a new run in another output_dir."
        )


def _differences(name: str, saved: Any, current: Any) -> list[str]:
    if isinstance(saved, dict) and isinstance(current, dict):
        keys = sorted(set(saved) | set(current))
        return [d for key in keys for d in _differences(f"{name}.{key}", saved.get(key), current.get(key))]
    return [] if saved == current or name in _MAY_MOVE else [f"{name} changed from {saved!r} to {current!r}"]
