"""What a run would refuse, found before it starts: each check returns a detail and a result, or raises."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)
from transformers.utils import logging as hf_logging

from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.planning.arguments import PlanArguments
from hf_curriculum_distill.planning.dry_run import DryRun
from hf_curriculum_distill.planning.models import find_teachers, is_config_only, num_positions
from hf_curriculum_distill.preparing.calibration import projected_pairs
from hf_curriculum_distill.preparing.checks import check_cache, check_embedding_basis, check_stages
from hf_curriculum_distill.projections import ProjectionBank
from hf_curriculum_distill.stages import Stage, StageScheduler, matched_pairs
from hf_curriculum_distill.teachers.checkpoints import check_schedule, schedule_ends
from hf_curriculum_distill.teachers.loading import check_teacher, load_teacher, needs_head
from hf_curriculum_distill.teachers.vocabularies import share_vocabulary

_TOKENIZER_FILES = ("tokenizer", "vocab", "spiece", "sentencepiece", "spm", "merges", "tekken", "bpe")


def load_tokenizer(options: PlanArguments) -> tuple[str, Any]:
    """Load the tokenizer that is given or the teacher's.

    Args:
        options: names the tokenizer and the teacher.

    Returns:
        A detail, and the tokenizer; None if none is given and the teacher has none within reach.

    Raises:
        OSError, ValueError: the tokenizer that is given cannot be loaded.
    """
    name = options.tokenizer or options.teacher_source
    if options.tokenizer is None and (name is None or is_config_only(name)):
        return "none is given; vocabularies are compared by size only", None
    try:
        if os.path.isdir(name) and not any(file.startswith(_TOKENIZER_FILES) for file in os.listdir(name)):
            raise FileNotFoundError(f"{name} has no tokenizer's files.")  # AutoTokenizer would make an empty one
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        if options.tokenizer is not None:
            raise
        return f"none within reach at {name} ({type(error).__name__}); vocabularies are compared by size only", None
    return f"{len(tokenizer):,} tokens ({name})", tokenizer


def check_vocabulary(options: PlanArguments, run: DryRun, tokenizer: Any) -> tuple[str, bool]:
    """Check that tokenizer, student and teacher share one vocabulary, and the models a task.

    Args:
        options: names the teacher.
        run: both models.
        tokenizer: of both; None: not known.

    Returns:
        A detail, and True.

    Raises:
        ValueError: they differ.
    """
    size = run.student.model.config.vocab_size
    if tokenizer is not None and len(tokenizer) > size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer):,} tokens, but the student's vocabulary {size:,} entries; build the "
            "student with vocab_size=len(tokenizer)."
        )
    if run.teacher is None:
        return f"{size:,} entries", True
    name = options.teacher_source
    name = None if is_config_only(name) else name
    check_teacher(run.student.model, run.teacher.model, tokenizer, name, run.args.matches_logits)
    if (shared := share_vocabulary(run.student.model, run.teacher, tokenizer)) is not None:
        return f"{shared:,} tokens that both models know; the student has {size:,} entries", True
    return f"{size:,} entries in both models", True


def check_weights(folders: Sequence[str], run: DryRun) -> tuple[str, bool | None]:
    """Check that the run will be able to load its teachers, by the function that loads them, without values.

    Args:
        folders: of the teachers; a folder, a config.json or a Hub repository each.
        run: both models.

    Returns:
        A detail, and True; None if a teacher has no safetensors file within reach.

    Raises:
        OSError: there are no weights.
        ValueError: weights are missing, of another size, or of a model without a head.
    """
    for folder in folders:
        if not _has_file(folder, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
            return _check_without_weights(folder, run.teacher.model), None
        with _quiet():  # the error says what transformers logs
            load_teacher(folder, run.student.model, without_values=True, needs_head=needs_head(run.args))
    return f"all that a {type(run.teacher.model).__name__} needs, by name and size", True


def check_batch(options: PlanArguments, run: DryRun) -> tuple[str, bool]:
    """Check that both models have room for an example's tokens, and that labels count in a micro-batch.

    Args:
        options: shape of an example, share of its labels, number of processes.
        run: both models and their micro-batch.

    Returns:
        A detail with the arithmetic of a step, and True.

    Raises:
        ValueError: an example is too long, or no label counts.
    """
    for who, model in (("student", run.student), ("teacher", run.teacher)):
        longest = model and num_positions(model.model)
        if longest and options.block_size > longest:
            raise ValueError(f"block_size is {options.block_size}, but the {who} reads at most {longest} tokens.")
    batch_size = run.args.per_device_train_batch_size
    if not run.num_rows:
        raise ValueError(
            f"mlm_probability is {options.mlm_probability}, with which no label counts in {batch_size} examples "
            f"of {options.block_size} tokens; raise it, or the batch."
        )
    accumulated, num_processes = run.args.gradient_accumulation_steps, options.num_processes
    examples = batch_size * accumulated * num_processes
    detail = f"{batch_size} examples x {accumulated} micro-batches x {num_processes} processes = {examples:,} examples"
    tokens, counted = math.prod(run.ids_shape[1:]), "embeddings" if options.task == "Embeddings" else "labels"
    detail += f" or {examples * tokens:,} tokens a step; in a micro-batch {run.num_rows:,} {counted} count"
    return detail, True


def check_layer_map(run: DryRun) -> tuple[str, tuple[Stage, ...]]:
    """Check the stages, their layer pairs, projections and cache against both models.

    Args:
        run: both models and the run's configuration.

    Returns:
        A detail, and the stages.

    Raises:
        ValueError: the run would refuse a stage.
    """
    depths = run.student.depth, run.teacher and run.teacher.partial_forward.depth
    stages = run.args.resolve_stages(*depths)
    if not stages:
        raise ValueError("There is no teacher and there are no stages, which is plain training; name a --teacher.")
    check_stages(stages, run.args, run.student, deepspeed=bool(run.args.deepspeed))
    check_cache(stages, run.args, run.student.model)
    pairs = run.teacher and projected_pairs(stages, run.args, run.student, run.teacher.partial_forward)
    if pairs:
        run.student.check_training(run.args.treats_layers_apart)
        widths = run.student.hidden_size, run.teacher.partial_forward.hidden_size
        check_embedding_basis(stages, run.args, *widths)
        bank = ProjectionBank.create(pairs[:1], *([width] for width in widths), kind=run.args.projection)
        bank.check_fits(pairs[:1], *widths, None if run.args.method == "online" else "")
    return f"{len(matched_pairs(stages))} layers of {depths[0]} learn from the teacher's {depths[1] or 0}", stages


def check_steps(
    stages: Sequence[Stage], options: PlanArguments, args: CurriculumDistillationConfig
) -> tuple[str, StageScheduler]:
    """Check that the stages, and a progressive teacher's checkpoints, fit into the run's steps.

    Args:
        stages: of the run.
        options: names the teacher.
        args: with `max_steps`.

    Returns:
        A detail, and the scheduler of the stages.

    Raises:
        ValueError: the number of steps is not known, or too small.
    """
    max_steps = args.max_steps
    if max_steps < 1:
        raise ValueError(f"max_steps is {max_steps}; a plan has no data set to count epochs of, so set max_steps.")
    scheduler = args.schedule(stages, max_steps)
    if args.method == "progressive" and options.teacher_source is not None:
        folders = find_teachers(options, args)
        check_schedule(folders, args.teacher_schedule)
        schedule_ends(folders, args.teacher_schedule, max_steps)
    return f"{len(stages)} stages in {max_steps:,} steps", scheduler


def _check_without_weights(folder: str, model: PreTrainedModel) -> str:
    """What a teacher's folder says of weights that are not safetensors, or not within reach."""
    if os.path.isdir(folder) and not _has_file(folder, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        raise FileNotFoundError(
            f"{folder} has a config.json, but no weights, so there is nothing to learn from; save the whole model "
            "there or, to plan without its weights, name the config.json."
        )
    saved = set(AutoConfig.from_pretrained(folder).architectures or ())
    if saved and saved <= set(MODEL_MAPPING_NAMES.values()) - {type(model).__name__}:
        raise ValueError(
            f"The configuration of {folder} says that it is a {', '.join(sorted(saved))}, which has no head; as a "
            f"{type(model).__name__} its head would be random. Use a checkpoint that was trained for this task."
        )
    says = f"; its configuration names {', '.join(sorted(saved))}" if saved else ""
    return f"{folder} has no safetensors file within reach: whether its head was trained is not known{says}"


def _has_file(folder: str, *names: str) -> bool:
    """Whether one of the files is in a model's folder or in the Hub's cache on this machine."""
    lenient = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    local = {"local_files_only": True, **lenient}
    return not is_config_only(folder) and any(cached_file(folder, name, **local) is not None for name in names)


@contextmanager
def _quiet() -> Iterator[None]:
    level, bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bar:
            hf_logging.enable_progress_bar()
