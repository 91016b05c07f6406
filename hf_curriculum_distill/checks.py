"""Checks that find what cannot work before it is tried: launches, stages, data sets, weights, batches."""

from __future__ import annotations

import functools
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from hf_curriculum_distill.adapted import stored_tensors, transformers_model
from hf_curriculum_distill.batch import Batch
from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.counting import (
    ONE_ROW_PER_EXAMPLE,
    is_ctc,
    num_classes,
    predicts_next_token,
)
from hf_curriculum_distill.layers import PartialForward, auxiliary_loss
from hf_curriculum_distill.losses import cross_entropy
from hf_curriculum_distill.stages import Stage, num_frozen_layers

_ONE_ROW_PER_TOKEN = ("ForMaskedLM", "ForTokenClassification")


def check_launch(
    args: CurriculumDistillationConfig, compute_loss_func: Callable | None, shards_parameters: bool = False
) -> None:
    """Raise a `ValueError` for Trainer's arguments with which losses would be wrong."""
    if args.logit_chunk_size and shards_parameters:
        raise ValueError(
            f"logit_chunk_size is {args.logit_chunk_size}, but FSDP and DeepSpeed need all logits at once; leave it "
            "out, or launch with DDP."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process would run as nn.DataParallel, which this trainer doesn't support; "
            "launch one process a GPU with `accelerate launch` or `torchrun`."
        )
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):  # the old and the new name
        if (getattr(args, name, None) or {}).get("use_reentrant"):
            raise ValueError(
                f"{name} has use_reentrant=True, with which blocks run outside of the graph that hidden states are "
                "taken from: layer stages get wrong gradients or none. Use use_reentrant=False, the default."
            )
    if compute_loss_func is not None:
        raise ValueError(
            "compute_loss_func was given together with teacher_model or stages, and both define the loss; leave "
            "compute_loss_func out."
        )
    if args.label_names is not None and "labels" not in args.label_names:
        raise ValueError(
            f"label_names is {args.label_names}, but losses are computed from 'labels'; rename the column, or leave "
            "label_names out."
        )


def check_stages(
    stages: Sequence[Stage], args: CurriculumDistillationConfig, student: PartialForward, deepspeed: bool
) -> None:
    """Raise a `ValueError` for stages that the method, the student or the launch cannot train.

    Args:
        deepspeed: whether the launch uses DeepSpeed.
    """
    _check_trained(stages, args, student)
    _check_logit_stages(stages, student.model)
    if args.method == "online" and args.standardize_targets and any(stage.hidden for stage in stages):
        raise ValueError(
            "stages match hidden states of an online teacher, and standardize_targets would measure them before it "
            "has learnt anything; set standardize_targets=False."
        )
    if deepspeed and args.weight_decay and not all(stage.needs_logits for stage in stages):
        raise ValueError(
            f"weight_decay is {args.weight_decay}, but DeepSpeed takes missing gradients for zeros and would shrink "
            "the blocks that a layer stage leaves out; set weight_decay=0, or launch with DDP or FSDP2."
        )


def _check_trained(stages: Sequence[Stage], args: CurriculumDistillationConfig, student: PartialForward) -> None:
    idle = []
    for index, stage in enumerate(stages):
        frozen = num_frozen_layers(stages, index, args.train_prefix, args.freeze_matched_layers)
        layer = student.depth if stage.needs_logits else max(stage.student_layers)
        trained = student.model.parameters() if stage.needs_logits else student.parameters_before(layer, frozen)
        if not any(parameter.requires_grad for parameter in trained):
            idle.append((stage, layer))
    if not idle:
        return
    names, highest = ", ".join(repr(stage.name) for stage, _ in idle), max(layer for _, layer in idle)
    kept = [list(pair) for pair in dict.fromkeys(p for s in stages for p in s.hidden) if pair[0] > highest]
    raise ValueError(
        f"{names} would train nothing: all parameters of the student that the loss reaches, up to block {highest}, "
        "have requires_grad=False; unfreeze some of them"
        + (f", or match higher layers only, with layer_map={kept}." if kept else ".")
    )


def _check_logit_stages(stages: Sequence[Stage], model: nn.Module) -> None:
    logit_stages = [stage.name for stage in stages if stage.needs_logits]
    if logit_stages and type(model).__name__ in MODEL_MAPPING_NAMES.values():
        raise ValueError(
            f"{type(model).__name__} has no head, but stage {logit_stages[0]!r} needs logits; load the student with "
            "the AutoModelFor class of its task, or match hidden states only, with explicit `stages`."
        )
    if not is_ctc(model):
        return
    if labelled := [stage.name for stage in stages if stage.label_weight]:
        raise ValueError(
            f"Stage {labelled[0]!r} learns from labels, but the transcripts of {type(model).__name__} belong to no "
            "frame; leave out label weights: the divergence is taken over all frames that are not padding."
        )
    if not hasattr(model, "_get_feat_extract_output_lengths") and logit_stages:
        raise ValueError(
            f"{type(model).__name__} doesn't say how many frames it makes of a recording, so that those of padding "
            "can't be left out of the divergence; match hidden states only, with explicit `stages`."
        )


def check_cache(stages: Sequence[Stage], args: CurriculumDistillationConfig, model: nn.Module) -> None:
    """Raise a `ValueError` if no targets can be cached, or the divergence needs more than the cache keeps."""
    if args.teacher_cache is None:
        return
    if not any(stage.needs_teacher for stage in stages):
        raise ValueError("teacher_cache was given, but no stage needs the teacher; leave it out.")
    k, classes = args.teacher_cache_logits, num_classes(model)
    whole = k is None or (classes is not None and k >= classes)
    if args.divergence != "forward_kl" and not whole and any(stage.kl_weight for stage in stages):
        raise ValueError(
            f"divergence is {args.divergence!r}, but of {classes} classes teacher_cache keeps {k} and the rest as one, "
            "which only 'forward_kl' can be computed from; use that, or teacher_cache_logits=None, which keeps all."
        )


def make_cache_folder(args: CurriculumDistillationConfig) -> None:
    """Create the folder of `args.teacher_cache`; raise an `OSError` if it cannot be written."""
    if args.teacher_cache is None:
        return
    try:
        os.makedirs(args.teacher_cache, exist_ok=True)
        tempfile.TemporaryFile(dir=args.teacher_cache).close()
    except OSError as error:
        raise OSError(
            f"teacher_cache {args.teacher_cache} cannot be written ({error}); give a folder that can."
        ) from error


def check_training_data(data: Any, args: CurriculumDistillationConfig) -> None:
    """Raise a `ValueError` for a data set that cannot be trained on."""
    if not hasattr(data, "__len__"):
        if args.max_steps <= 0:
            raise ValueError(
                "max_steps is not set and train_dataset has no length, so where stages end is unknown; set max_steps."
            )
        return
    if len(data) == 0:
        raise ValueError("train_dataset is empty; there is nothing to train on.")
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and len(data) < batch:
        raise ValueError(
            f"train_dataset has {len(data)} examples, fewer than a batch of all processes ({batch}), and "
            "dataloader_drop_last leaves them out; set it to False or lower the batch size."
        )


def check_finite_weights(model: nn.Module, who: str) -> None:
    """Raise a `ValueError` that names the first parameter with values that are nan, inf or missing.

    Args:
        who: the model, as the message names it.
    """
    named = [(name, tensor) for name, tensor in stored_tensors(model) if tensor.is_floating_point()]
    if missing := [name for name, tensor in named if tensor.is_meta]:
        raise ValueError(f"{missing[0]} of the {who} has no values yet (device 'meta'); load its weights first.")
    # a sum is finite only if all its terms are, and needs no second tensor of the same size
    finite = [tensor.sum(dtype=torch.float32).isfinite() for _, tensor in named]
    if finite and not torch.stack([flag.to(finite[0].device) for flag in finite]).all():  # waits once
        name = next(name for (name, _), flag in zip(named, finite, strict=True) if not flag)
        raise ValueError(
            f"{name} of the {who} has values that are nan or inf, and so would be its logits; take a sound "
            "checkpoint or, where a cast to float16 overflowed, another dtype."
        )


@contextmanager
def naming_batch(where: str) -> Iterator[None]:
    """Turn errors into a `ValueError` that names the batch; data sets and collators raise errors of all kinds.

    Args:
        where: the batch, as the message names it.
    """
    try:
        yield
    except (ValueError, TypeError, LookupError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f"The batch of {where} cannot be used: {error}") from error


def check_batch(model: nn.Module, inputs: Mapping[str, Any], reads_labels: bool = True) -> None:
    """Check that a batch means what the losses take it to mean.

    Shapes are always checked, values only if they are in host memory: nothing waits for the device.

    Args:
        inputs: the batch.
        reads_labels: whether a loss needs its labels.

    Raises:
        ValueError: an input is missing or empty, or tokens, attention mask and labels do not fit each other or the
            model.
    """
    model = transformers_model(model)
    name, classes = model.main_input_name, num_classes(model)
    main = inputs.get(name) if isinstance(inputs, Mapping) else None
    if not isinstance(main, Tensor) or not main.numel():
        held = ", ".join(inputs) if isinstance(inputs, Mapping) else f"a {type(inputs).__name__}"
        raise ValueError(
            f"The batch has no {name}, or none but empty ones; it holds {held or 'nothing'}. {type(model).__name__} "
            "needs them. Check the data set's columns and the collator."
        )
    mask, labels = inputs.get("attention_mask"), inputs.get("labels")
    if name == "input_ids":
        if main.is_floating_point() or main.dim() != 2:
            raise ValueError(f"input_ids are {_describe(main)}; token numbers of shape [batch, length] are needed.")
        _check_values(main, "input_ids", getattr(model.config.get_text_config(), "vocab_size", None))
        if mask is not None and (mask.dim() < 2 or (mask.dim() == 2 and mask.shape != main.shape)):
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)} but input_ids {tuple(main.shape)}; they must have one "
                "entry a token. Check the collator."
            )
    elif main.device.type == "cpu" and not main.isfinite().all():
        raise ValueError(f"{name} have values that are nan or inf; check the data and its preprocessing.")
    if labels is None or not reads_labels or is_ctc(model):
        return
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"labels are a {type(labels).__name__}; class numbers of shape [batch] or [batch, length] are needed to "
            "match the teacher's class probabilities. Match hidden states only, with explicit `stages`."
        )
    if labels.is_floating_point() or labels.dim() not in (1, 2):
        raise ValueError(
            f"labels are {_describe(labels)}; class numbers of shape [batch] or [batch, length] are needed to match "
            "the teacher's class probabilities."
        )
    per_token = predicts_next_token(model) or _is_for(type(model), _ONE_ROW_PER_TOKEN)
    wanted = main.shape if per_token else main.shape[: 1 if _is_for(type(model), ONE_ROW_PER_EXAMPLE) else 0]
    if len(labels) != len(main) or (wanted and labels.shape != wanted):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} but {name} {tuple(main.shape)}; {type(model).__name__} needs one "
            f"label {'a token' if per_token else 'an example'}. Check the collator."
        )
    _check_values(labels.where(labels != -100, 0), "labels", classes, " (-100: does not count)")


def label_loss_mismatch(batch: Batch, outputs: Mapping[str, Any] | Sequence[Any], tolerance: float) -> str | None:
    """Compare a model's own loss on a batch with the cross-entropy of the rows that count.

    They differ if labels belong to other rows of the logits than [`counted_rows`] assumes, or are not classes.

    Args:
        outputs: the model's outputs in evaluation mode.
        tolerance: the relative difference that the precision of the losses allows.

    Returns:
        a sentence that says how they differ; None if they do not, or cannot be compared.
    """
    if not isinstance(outputs, Mapping):
        outputs = dict(zip(("loss", "logits"), outputs, strict=False))
    loss, logits, name = outputs.get("loss"), outputs.get("logits"), type(batch.model).__name__
    if not isinstance(logits, Tensor):
        return None if logits is None else f"The logits of {name} are a {type(logits).__name__}, not a tensor."
    try:
        rows, labels, wanted = batch.rows, batch.labels, len(batch) * batch.rows_per_example
    except ValueError as error:
        return str(error)
    if logits.shape[:-1].numel() != wanted:
        return f"The logits of {name} have shape {tuple(logits.shape)}, but the batch's labels belong to {wanted} rows."
    if labels is None or loss is None or not len(labels):
        return None
    ours = cross_entropy(logits.flatten(0, -2)[rows], labels).item() / len(labels)
    own = loss.item() - float(auxiliary_loss(batch.model, outputs))
    if not math.isfinite(ours) or math.isclose(ours, own, rel_tol=tolerance, abs_tol=tolerance):
        return None
    return (
        f"The loss of {name} on a batch is {own:.6g}, but the cross-entropy of its logits with the labels that count "
        f"is {ours:.6g}, so its labels mean something else than the classes of these rows."
    )


def _check_values(numbers: Tensor, name: str, end: int | None, beside: str = "") -> None:
    if end is None or numbers.device.type != "cpu":
        return
    low, high = (value.item() for value in numbers.aminmax())
    if low < 0 or high >= end:
        raise ValueError(
            f"{name} hold {low if low < 0 else high}, but the model knows 0 to {end - 1}{beside}. Check that data, "
            "tokenizer and model belong together."
        )


@functools.cache
def _is_for(model_class: type, tasks: tuple[str, ...]) -> bool:
    return any(task in base.__name__ for base in model_class.__mro__ for task in tasks)


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"
