"""Checks that find what cannot work before it is tried: launches, stages, data sets, weights, batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.layers.blocks import find_block_stack
from hf_curriculum_distill.layers.forward import PartialForward
from hf_curriculum_distill.layers.heads import CLASSES, Head, head_of, is_ctc, num_classes
from hf_curriculum_distill.logs import get_logger
from hf_curriculum_distill.losses import TOP_DIVERGENCES
from hf_curriculum_distill.stages import Stage

logger = get_logger(__name__)


def check_launch(
    args: CurriculumDistillationConfig,
    compute_loss_func: Callable | None,
    shards_parameters: bool = False,
    has_optimizer: bool = False,
    head: Head = CLASSES,
) -> None:
    """Raise a `ValueError` for Trainer's arguments with which losses or steps would be wrong.

    Args:
        compute_loss_func: that the trainer was given.
        shards_parameters: whether it is launched with FSDP or DeepSpeed.
        has_optimizer: whether it was given an optimizer or a scheduler.
        head: what the rows of the student's logits are.
    """
    if args.finished_layer_rate != 1 and (shards_parameters or has_optimizer):
        why = "FSDP and DeepSpeed shard them" if shards_parameters else "`optimizers` were given"
        raise ValueError(
            f"finished_layer_rate is {args.finished_layer_rate}, which needs the trainer's own groups of parameters, "
            f"one a layer, but {why}; "
            + ("launch with DDP." if shards_parameters else "leave them out, or pass optimizer_cls_and_kwargs.")
        )
    if args.measures_order and shards_parameters:
        raise ValueError(
            "layer_order='complexity' needs all gradients of the student in one process, but FSDP and DeepSpeed shard "
            "them; launch with DDP, or use another layer_order."
        )
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
    if args.label_names is not None and args.matches_logits and not {*head.label_names} <= {*args.label_names}:
        raise ValueError(
            f"label_names is {args.label_names}, but losses are computed from "
            f"{' and '.join(map(repr, head.label_names))}; rename the column, or leave label_names out."
        )


def check_blocks(args: CurriculumDistillationConfig, *models: PartialForward | None) -> None:
    """Raise a `ValueError` if layers shall be matched, and a model has no stack of blocks whose layers can be."""
    if args.stages is None:
        matches_layers = args.method in ("curriculum", "hidden")
    else:
        matches_layers = any(Stage(**stage).hidden for stage in args.stages)
    for model in models:
        if matches_layers and model is not None and not model.blocks:
            find_block_stack(model.model, model.stack)  # raises


def check_stages(
    stages: Sequence[Stage], args: CurriculumDistillationConfig, student: PartialForward, deepspeed: bool
) -> None:
    """Raise a `ValueError` for stages that the method, the student or the launch cannot train.

    Args:
        deepspeed: whether the launch uses DeepSpeed.
    """
    _check_trained(stages, args, student)
    if args.pooling is None:
        _check_logit_stages(stages, student.model)
    else:
        _check_pooled(stages, args, student.model)
    _check_labels(stages, args, student.model)
    if args.matches_logits and head_of(student.model).predicts_numbers:
        _check_of_numbers(args)
    if args.method == "online" and args.standardize_targets and any(stage.hidden for stage in stages):
        raise ValueError(
            "stages match hidden states of an online teacher, and standardize_targets would measure them before it "
            "has learnt anything; set standardize_targets=False."
        )
    if deepspeed and not args.carry_optimizer:
        raise ValueError("carry_optimizer=False can't be had with DeepSpeed, which keeps its own optimizer; use DDP.")
    checkpoints = any(getattr(args, f"{name}_checkpointing", False) for name in ("activation", "gradient"))
    if args.train_prefix == "independent" and checkpoints and student.hooks_blocks_in_recomputation:
        raise ValueError(
            f"train_prefix='independent' gives blocks of {type(student.model).__name__} other inputs than those that "
            "gradient_checkpointing would recompute them from; leave one of the two out."
        )
    if deepspeed and args.weight_decay and not all(stage.needs_logits for stage in stages):
        raise ValueError(
            f"weight_decay is {args.weight_decay}, but DeepSpeed takes missing gradients for zeros and would shrink "
            "the blocks that a layer stage leaves out; set weight_decay=0, or launch with DDP or FSDP2."
        )


def _check_trained(stages: Sequence[Stage], args: CurriculumDistillationConfig, student: PartialForward) -> None:
    idle = []
    for index, stage in enumerate(stages):
        frozen = args.frozen_layer(stages, index)
        layer = student.depth if stage.needs_logits else max(stage.student_layers)
        trained = student.model.parameters() if stage.needs_logits else student.parameters_before(layer, frozen)
        if not any(parameter.requires_grad for parameter in trained):
            idle.append((stage, layer))
    if not idle:
        return
    off = "have requires_grad=False"
    if args.freeze_embeddings_in_layer_stages:
        off += " or are frozen by freeze_embeddings_in_layer_stages"
    names, highest = ", ".join(repr(stage.name) for stage, _ in idle), max(layer for _, layer in idle)
    kept = [list(pair) for pair in dict.fromkeys(p for s in stages for p in s.hidden) if pair[0] > highest]
    raise ValueError(
        f"{names} would train nothing: all parameters of the student that the loss reaches, up to block {highest}, "
        f"{off}; unfreeze some of them" + (f", or match higher layers only, with layer_map={kept}." if kept else ".")
    )


def _check_logit_stages(stages: Sequence[Stage], model: nn.Module) -> None:
    logit_stages = [stage.name for stage in stages if stage.needs_logits]
    if logit_stages and type(model).__name__ in MODEL_MAPPING_NAMES.values():
        raise ValueError(
            f"{type(model).__name__} has no head, but stage {logit_stages[0]!r} needs logits; load the student with "
            "the AutoModelFor class of its task, or match hidden states only, with method='hidden'."
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
            "can't be left out of the divergence; match hidden states only, with method='hidden'."
        )


def _check_pooled(stages: Sequence[Stage], args: CurriculumDistillationConfig, model: nn.Module) -> None:
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"pooling is {args.pooling!r}, but {type(model).__name__} returns the states of its decoder; load the "
            "encoder alone, such as T5EncoderModel."
        )
    if labelled := [stage.name for stage in stages if stage.label_weight]:
        raise ValueError(
            f"Stage {labelled[0]!r} learns from labels, which the embeddings of pooling={args.pooling!r} have none of; "
            "leave out label weights."
        )


def check_embedding_basis(
    stages: Sequence[Stage], args: CurriculumDistillationConfig, student_dim: int, teacher_dim: int
) -> None:
    """Raise a `ValueError` if a stage matches embeddings and hidden states that no student can have both.

    Args:
        student_dim, teacher_dim: the models' hidden sizes.
    """
    if args.pooling is None or not (both := [stage.name for stage in stages if stage.kl_weight and stage.hidden]):
        return
    wrong = {"standardize_targets": (True, False)} if args.standardize_targets else {}
    if student_dim == teacher_dim and args.projection != "identity":
        wrong["projection"] = (args.projection, "identity")
    for name, (given, instead) in wrong.items():
        raise ValueError(
            f"{name} is {given!r}, but stage {both[0]!r} matches hidden states beside embeddings (pooling="
            f"{args.pooling!r}), which are the teacher's{'' if student_dim == teacher_dim else ', projected'}: targets "
            f"of both can't be met. Set {name}={instead!r}, or hidden_weight_in_logit_stage=0."
        )


def _check_labels(stages: Sequence[Stage], args: CurriculumDistillationConfig, model: nn.Module) -> None:
    if args.class_weights is not None:
        if not any(stage.label_weight for stage in stages) and args.method != "online":
            raise ValueError(
                "class_weights was given, but no stage learns from labels; set label_loss_weight, or leave it out."
            )
        if len(args.class_weights) != (classes := num_classes(model)):
            raise ValueError(
                f"class_weights has {len(args.class_weights)} numbers, but {type(model).__name__} has {classes} "
                "classes; give one for each, by class number."
            )
    gated = any(stage.kl_weight and stage.label_weight for stage in stages)
    if args.teacher_entropy_threshold is not None and not gated:
        raise ValueError(
            "teacher_entropy_threshold was given, which chooses between teacher and label, but no stage learns from "
            "both; set label_loss_weight, or leave it out."
        )


def _check_of_numbers(args: CurriculumDistillationConfig) -> None:
    """Of numbers there are no distributions: nothing that changes a divergence or a cross-entropy has a meaning."""
    defaults = {"divergence": "forward_kl", "temperature": 1.0, "label_smoothing_factor": 0.0}
    for name, value in (defaults | {"class_weights": None, "teacher_entropy_threshold": None}).items():
        if getattr(args, name) != value:
            raise ValueError(
                f"{name} is {getattr(args, name)!r}, but the student predicts numbers, whose loss is their squared "
                f"error; leave {name} out."
            )


def check_cache(stages: Sequence[Stage], args: CurriculumDistillationConfig, model: nn.Module) -> None:
    """Raise a `ValueError` if no targets can be cached, or the divergence needs more than the cache keeps."""
    if args.teacher_cache is None:
        return
    if not any(stage.needs_teacher for stage in stages):
        raise ValueError("teacher_cache was given, but no stage needs the teacher; leave it out.")
    k, classes = args.teacher_cache_logits, num_classes(model)
    whole = k is None or (classes is not None and k >= classes)
    if args.divergence not in TOP_DIVERGENCES and not whole and any(stage.kl_weight for stage in stages):
        raise ValueError(
            f"divergence is {args.divergence!r}, but of {classes or 'the'} classes teacher_cache keeps {k} and the "
            f"rest as one, which only {' and '.join(map(repr, TOP_DIVERGENCES))} can be computed from; use one of "
            "these, or teacher_cache_logits=None, which keeps all."
        )


def warn_of_small_rate(student: PreTrainedModel, args: CurriculumDistillationConfig) -> None:
    """Warn where a student that was read from no folder would train with the default rate of `TrainingArguments`."""
    if student.config.name_or_path == "" and args.learning_rate == TrainingArguments.learning_rate:
        logger.warning(
            "learning_rate is %g, the default of TrainingArguments, which suits the fine-tuning of a pretrained model; "
            "a student that was just made needs about 20 times as much: try learning_rate=1e-3, warmup_steps=0.1 and "
            "lr_scheduler_type='cosine'.",
            args.learning_rate,
        )


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
