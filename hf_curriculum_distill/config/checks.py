"""Checks of [`CurriculumDistillationConfig`]'s values, one by one and of those that can't be combined."""

from __future__ import annotations

import json
import math
import os
from typing import Any

import torch
from transformers import TrainingArguments

from hf_curriculum_distill.hidden_losses import HIDDEN_LOSSES
from hf_curriculum_distill.losses import DIVERGENCES
from hf_curriculum_distill.projections import PROJECTIONS
from hf_curriculum_distill.stages import LAYER_ORDERS, parse_layer_pairs

METHODS = ("curriculum", "one_shot", "progressive", "online", "labels", "hidden")
UNCACHED_METHODS = ("progressive", "online", "labels")  # no teacher whose targets stay the same
POOLINGS = ("mean", "cls", "last", "pooler")
TEACHER_DTYPES = ("float32", "bfloat16", "float16")
# their learning rates depend on more than the step, so they can't be restarted in each stage
_STATEFUL_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
# their steps don't follow the learning rates of parameter groups, or their memory is elsewhere than in their state
_OTHER_OPTIMIZERS = ("layerwise", "lomo", "schedule_free")
_OTHER_KWARGS = {
    "token": "log in with `hf auth login` or set HF_TOKEN, because arguments are logged and saved",
    "torch_dtype": "its name is 'dtype'",
    "output_loading_info": "the trainer sets it",
    "ignore_mismatched_sizes": "a teacher that lacks weights is never used",
    "state_dict": "load the model yourself and pass it as teacher_model",
}
_FLAGS = ("shared_projection", "standardize_targets", "freeze_matched_layers", "truncate", "restart_schedule_per_stage")
_FLAGS += ("freeze_embeddings_in_layer_stages", "carry_optimizer", "evaluate_layers")


def parse_json(config: TrainingArguments) -> None:
    """Parse lists and dictionaries that were written as JSON, as on a command line."""
    kinds = {"[": "list", "{": "object"}
    for name in ("stages", "layer_map", "class_weights", "teacher_schedule", "teacher_model_init_kwargs"):
        value = getattr(config, name)
        if isinstance(value, str) and value[:1] in kinds:
            try:
                setattr(config, name, json.loads(value))
            except json.JSONDecodeError as error:
                kind = kinds[value[0]]
                raise ValueError(f"{name} is {value!r}, which is no valid JSON {kind} ({error}).") from error
    if isinstance(kwargs := config.teacher_model_init_kwargs, dict):  # as JSON has dtypes and quantisation configs
        plain = {n: str(v).removeprefix("torch.") if isinstance(v, torch.dtype) else v for n, v in kwargs.items()}
        plain = {name: value.to_dict() if hasattr(value, "to_dict") else value for name, value in plain.items()}
        config.teacher_model_init_kwargs = plain


def check_values(config: TrainingArguments) -> None:
    """Check each value, and those that exclude each other.

    Args:
        config: a [`CurriculumDistillationConfig`] whose lists are parsed already.

    Raises:
        ValueError: a value is unknown, out of range or excluded by another.
    """
    _check_choice(config, "method", METHODS)
    _check_choice(config, "layer_order", LAYER_ORDERS)
    _check_choice(config, "divergence", tuple(DIVERGENCES))
    _check_choice(config, "hidden_loss", tuple(HIDDEN_LOSSES))
    _check_choice(config, "projection", PROJECTIONS)
    _check_choice(config, "hidden_positions", ("tokens", "labels"))
    _check_choice(config, "layer_stack", ("encoder", "decoder"))
    _check_choice(config, "train_prefix", ("joint", "block", "independent"))
    _check_choice(config, "teacher_dtype", (None, *TEACHER_DTYPES))
    _check_choice(config, "pooling", (None, *POOLINGS))
    attention = config.attn_implementation
    if attention is not None and not (isinstance(attention, str) and attention):
        raise ValueError(
            f"attn_implementation is {attention!r}; use a name that transformers knows, such as 'sdpa', or leave it "
            "out."
        )
    if isinstance(config.layer_map, (list, tuple)):
        parse_layer_pairs(config.layer_map)
    else:
        _check_choice(config, "layer_map", ("uniform", "last"), " or [[student_layer, teacher_layer], ...]")
    for name in _FLAGS:
        if not isinstance(getattr(config, name), bool):  # a string like "false" would count as True
            raise ValueError(f"{name} is {getattr(config, name)!r}; it must be True or False.")
    _check_range(config, "layer_stage_fraction", 0, 1, "1 excluded", lambda x: 0 <= x < 1)
    _check_range(config, "stage_warmup_ratio", 0, 1, "1 excluded", lambda x: 0 <= x < 1)
    for name in ("temperature", "hidden_weight"):
        _check_range(config, name, 0, math.inf, "0 excluded", lambda x: 0 < x < math.inf)
    if config.divergence == "hard" and config.temperature != 1:
        raise ValueError(
            f"temperature is {config.temperature!r} with divergence='hard', which has none: the teacher's first choice "
            "is the same at every temperature, and the student's is 1. Leave temperature out, or use another "
            "divergence."
        )
    for name in ("hidden_weight_in_logit_stage", "label_loss_weight"):
        _check_range(config, name, 0, math.inf, "finite", lambda x: 0 <= x < math.inf)
    if config.hidden_weight_at_end is not None:
        _check_range(config, "hidden_weight_at_end", 0, math.inf, "finite", lambda x: 0 <= x < math.inf)
        if not (config.hidden_weight_at_end or config.hidden_weight_in_logit_stage):
            raise ValueError(
                "hidden_weight_at_end is 0, and so is hidden_weight_in_logit_stage, so that the logit stage has no "
                "hidden term to anneal; set hidden_weight_in_logit_stage to the weight that it begins with."
            )
    if not (config.layer_stage_fraction or config.hidden_weight_in_logit_stage or config.hidden_weight_at_end):
        raise ValueError(
            "layer_stage_fraction is 0, and so is hidden_weight_in_logit_stage, so that no hidden states are matched; "
            "give one of them a value, or use method='one_shot'."
        )
    _check_range(config, "finished_layer_rate", 0, 1, "0 excluded", lambda x: 0 < x <= 1)
    _check_range(config, "projection_seed", 0, 2**64, "whole", lambda x: isinstance(x, int) and 0 <= x < 2**64)
    counts = ["calibration_samples", "per_device_train_batch_size", "gradient_accumulation_steps"]
    counts += [name for name in ("num_layer_stages", "teacher_cache_logits") if getattr(config, name) is not None]
    for name in counts:
        _check_range(config, name, 1, math.inf, "whole", lambda x: isinstance(x, int) and x >= 1)
    # knobs of TrainingArguments that stages and losses are computed from
    _check_range(config, "max_steps", -1, math.inf, "whole; -1: by epochs", lambda x: isinstance(x, int))
    _check_range(config, "num_train_epochs", 0, math.inf, "finite", lambda x: 0 <= x < math.inf or config.max_steps > 0)
    _check_range(config, "learning_rate", 0, math.inf, "finite", lambda x: 0 <= x < math.inf)
    _check_range(config, "label_smoothing_factor", 0, 1, "both included", lambda x: 0 <= x <= 1)
    _check_schedule(config)
    _check_between_stages(config)
    _check_who_teaches(config)
    _check_teacher_loading(config)
    _check_labels(config)
    _check_hidden(config)
    _check_pooling(config)
    if config.logit_chunk_size is not None:
        _check_range(config, "logit_chunk_size", 0, math.inf, "whole", lambda x: isinstance(x, int) and x >= 0)
        for name in ("torch_compile", "fp16", "deepspeed", "fsdp"):
            if config.logit_chunk_size and getattr(config, name):
                raise ValueError(
                    f"logit_chunk_size is {config.logit_chunk_size}, but with {name} logits are computed at once, "
                    "because gradients of a chunk are taken inside the forward pass; leave one of the two out."
                )
    _check_cache(config)


def too_few_steps(config: TrainingArguments, num_layer_stages: int, max_steps: int) -> str:
    """What is wrong with `max_steps` that are too few for the layer stages."""
    fraction, share, needed = config.layer_stage_fraction, f"{max_steps} steps", num_layer_stages
    if config.method != "hidden":
        share = f"{100 * fraction:g} % of {share}, with the rest for the logit stage,"
        needed = max(math.ceil(num_layer_stages / fraction), math.floor(0.5 / (1 - fraction)) + 1)
    return (
        f"{num_layer_stages} layer stages in {share} need max_steps >= {needed}; raise it, lower num_layer_stages, or "
        "use layer_order='last', which has one layer stage."
    )


def _check_schedule(config: TrainingArguments) -> None:
    schedule = getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type)
    knobs = {
        "restart_schedule_per_stage": config.restart_schedule_per_stage,
        "method='online'": config.method == "online",
        "finished_layer_rate": config.finished_layer_rate != 1,
    }
    if schedule in _STATEFUL_SCHEDULES and any(knobs.values()):
        knob = next(name for name, used in knobs.items() if used)
        raise ValueError(
            f"{knob} needs a schedule that is a function of the step, but lr_scheduler_type is {schedule!r}; use "
            "one like 'cosine' or 'linear'."
        )


def _check_between_stages(config: TrainingArguments) -> None:
    if config.train_prefix == "independent" and config.stages is None and config.layer_order != "together":
        raise ValueError(
            f"train_prefix='independent' trains all segments at once, but layer_order is {config.layer_order!r}, which "
            "matches one layer after another; use layer_order='together'."
        )
    if config.measures_order and config.method == "curriculum" and not config.layer_stage_fraction:
        raise ValueError(
            "layer_stage_fraction is 0, so that there are no layer stages for layer_order='complexity' to order; give "
            "them a share of the steps, or use another layer_order."
        )
    if config.train_prefix == "block" and config.finished_layer_rate != 1:
        raise ValueError(
            f"finished_layer_rate is {config.finished_layer_rate}, but train_prefix='block' freezes the finished "
            "layers; use train_prefix='joint', or leave finished_layer_rate out."
        )
    if config.freeze_embeddings_in_layer_stages and config.layer_stack == "decoder":
        raise ValueError(
            "freeze_embeddings_in_layer_stages was given with layer_stack='decoder', whose first block runs after the "
            "whole encoder, which would be frozen, too; leave it out, or match the encoder."
        )
    optimizer = getattr(config.optim, "value", config.optim)
    knobs = {
        f"finished_layer_rate={config.finished_layer_rate}": (config.finished_layer_rate != 1, ("deepspeed", "fsdp")),
        "carry_optimizer=False": (not config.carry_optimizer, ("deepspeed",)),
    }
    for knob, (used, launches) in knobs.items():
        if used and any(kind in optimizer for kind in _OTHER_OPTIMIZERS):
            raise ValueError(
                f"{knob} needs an optimizer with a learning rate for each group of parameters and a state for each "
                f"parameter, but optim is {optimizer!r}; use one like 'adamw_torch'."
            )
        for name in launches if used else ():
            if getattr(config, name):
                raise ValueError(f"{knob} can't be had with {name}, whose optimizer is out of reach; launch with DDP.")


def _check_who_teaches(config: TrainingArguments) -> None:
    if not isinstance(config.teacher_schedule, (list, tuple)):
        _check_choice(config, "teacher_schedule", ("step", "fraction"))
    else:
        for end in config.teacher_schedule:
            whole = isinstance(end, int) and not isinstance(end, bool) and end >= 1
            if not (whole or (isinstance(end, float) and 0 < end < 1)):
                raise ValueError(
                    f"teacher_schedule has {end!r}; write a number of steps from 1, or a fraction of max_steps "
                    "between 0 and 1."
                )
    if config.teacher_learning_rate is not None:
        _check_range(config, "teacher_learning_rate", 0, math.inf, "0 excluded", lambda x: 0 < x < math.inf)
    if config.method == "online":
        if config.fp16:
            raise ValueError("method='online' with fp16 has no loss scaling for the teacher; use bf16 or fp32.")
        if config.teacher_dtype not in (None, "float32"):
            raise ValueError(
                f"teacher_dtype is {config.teacher_dtype!r}, but method='online' trains the teacher, which needs "
                "'float32' weights; use bf16=True for speed."
            )


def _check_teacher_loading(config: TrainingArguments) -> None:
    given = config.teacher_model_init_kwargs
    if given is None:
        return
    try:
        if not isinstance(given, dict) or any(not isinstance(name, str) for name in given):
            raise TypeError("it is no dictionary by name")
        json.dumps(given)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"teacher_model_init_kwargs is {given!r} ({error}); give arguments of from_pretrained by name, with values "
            "that JSON can hold."
        ) from error
    for name in sorted(given.keys() & _OTHER_KWARGS.keys()):
        raise ValueError(f"teacher_model_init_kwargs has {name!r}; {_OTHER_KWARGS[name]}.")
    for name, field in {"dtype": "teacher_dtype", "attn_implementation": "attn_implementation"}.items():
        ours = getattr(config, field)
        if ours is not None and given.get(name, ours) != ours:
            raise ValueError(
                f"{field} is {ours!r}, but teacher_model_init_kwargs has {name!r}: {given[name]!r}; give one of the "
                "two."
            )
    if config.method == "online" and given.get("dtype", "float32") != "float32":
        raise ValueError(
            f"teacher_model_init_kwargs has 'dtype': {given['dtype']!r}, but method='online' trains the teacher, which "
            "needs 'float32' weights; use bf16=True for speed."
        )


def _check_labels(config: TrainingArguments) -> None:
    if config.class_weights is not None:
        numbers = config.class_weights if isinstance(config.class_weights, (list, tuple)) else [None]
        valid = all(isinstance(x, (int, float)) and not isinstance(x, bool) and 0 <= x < math.inf for x in numbers)
        if not valid or not any(numbers):
            raise ValueError(
                f"class_weights is {config.class_weights!r}; give a list with a number from 0 for each class, not all "
                "of them 0."
            )
    if config.teacher_entropy_threshold is not None:
        _check_range(config, "teacher_entropy_threshold", 0, 1, "both included", lambda x: 0 <= x <= 1)


def _check_hidden(config: TrainingArguments) -> None:
    if config.method != "hidden":
        return
    for name in ("label_loss_weight", "hidden_weight_at_end", "freeze_matched_layers"):
        if getattr(config, name):
            raise ValueError(
                f"{name} is {getattr(config, name)!r}, but method='hidden' has no logit stage that it could change; "
                "leave it out, or use method='curriculum'."
            )


def _check_pooling(config: TrainingArguments) -> None:
    if config.pooling is None:
        return
    if config.method in ("labels", "online"):
        raise ValueError(
            f"pooling is {config.pooling!r}, but method={config.method!r} learns from labels, which embeddings have "
            "none of; use method='curriculum' or 'one_shot', or leave pooling out."
        )
    defaults = {"divergence": "forward_kl", "temperature": 1.0, "label_smoothing_factor": 0.0, "label_loss_weight": 0.0}
    defaults |= {"class_weights": None, "teacher_entropy_threshold": None, "hidden_positions": "tokens"}
    for name, value in (defaults | {"layer_stack": "encoder"}).items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name} is {getattr(config, name)!r}, but pooling={config.pooling!r} compares embeddings, by "
                f"hidden_loss and of all tokens; leave {name} out."
            )
    if config.teacher_cache is not None and config.teacher_cache_logits is not None:
        raise ValueError(
            f"teacher_cache_logits is {config.teacher_cache_logits}, but of embeddings (pooling={config.pooling!r}) "
            "teacher_cache has to keep every number; set teacher_cache_logits=None (null in YAML)."
        )


def _check_cache(config: TrainingArguments) -> None:
    if config.teacher_cache is None:
        return
    if not isinstance(config.teacher_cache, (str, os.PathLike)) or not os.fspath(config.teacher_cache):
        raise ValueError(f"teacher_cache is {config.teacher_cache!r}; give the name of a folder.")
    config.teacher_cache = os.fspath(config.teacher_cache)
    if config.method in UNCACHED_METHODS:
        why = "no teacher is used" if config.method == "labels" else "the teacher changes while it teaches"
        raise ValueError(
            f"teacher_cache was given with method={config.method!r}, in which {why}, so that nothing can be read "
            "again; leave it out, or use method='curriculum' or 'one_shot'."
        )


def _check_choice(config: TrainingArguments, name: str, choices: tuple, otherwise: str = "") -> None:
    if getattr(config, name) not in choices:
        allowed = ", ".join(map(repr, choices)) + otherwise
        raise ValueError(f"{name} is {getattr(config, name)!r}; use one of {allowed}.")


def _check_range(config: TrainingArguments, name: str, low: float, high: float, note: str, holds: Any) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not holds(value):
        raise ValueError(f"{name} is {value!r}; it must be a number between {low} and {high} ({note}).")
