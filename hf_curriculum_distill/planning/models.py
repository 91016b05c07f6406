"""Models that a plan names: their sizes and configurations, and both models of a run without values."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, BertConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.layers.blocks import describe_model
from hf_curriculum_distill.layers.configurations import student_config, student_size
from hf_curriculum_distill.layers.forward import PartialForward
from hf_curriculum_distill.layers.heads import head_of, predicts_next_token
from hf_curriculum_distill.layers.students import make_student
from hf_curriculum_distill.planning.arguments import TASKS, PlanArguments
from hf_curriculum_distill.planning.dry_run import DryRun
from hf_curriculum_distill.teachers.checkpoints import find_checkpoints
from hf_curriculum_distill.teachers.online import OnlineTeacher
from hf_curriculum_distill.teachers.teacher import Teacher

SIZES = {"bert-large": (24, 1024), "bert-large-narrow": (24, 512), "bert-base": (12, 768)}


def find_size(name: str) -> tuple[int, int | None] | None:
    """Find the number of blocks and the hidden size that a name such as `bert-6-768` or `bert-large` stands for.

    Args:
        name: `bert-LAYERS-HIDDEN` or one of [`SIZES`]; of a student also `teacher-LAYERS` or `teacher-LAYERS-HIDDEN`.

    Returns:
        `(blocks, hidden size)`, where None is the teacher's hidden size; None if the name is no size, or a file or
        folder has this name.

    ```python
    >>> find_size("bert-6-768"), find_size("bert-base"), find_size("gpt2")
    ((6, 768), (12, 768), None)

    ```
    """
    if (size := student_size(name)) is not None:
        return size
    size = re.fullmatch(r"bert-(\d+)-(\d+)", name)
    if os.path.exists(name) or not (size or name in SIZES):
        return None
    return tuple(map(int, size.groups())) if size else SIZES[name]


def is_config_only(name: str) -> bool:
    """Whether a model's name is a size or a config.json, which come without weights and tokenizer."""
    return os.path.isfile(name) or find_size(name) is not None


def is_hub_name(name: str) -> bool:
    """Whether a name can be that of a model on the Hub, as OWNER/NAME, and is no file or folder here."""
    return not os.path.exists(name) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def find_config(
    name: str,
    dropout: float = 0.1,
    teacher: PreTrainedConfig | None = None,
    where: Mapping[str, Any] | None = None,
    **bert: Any,
) -> PreTrainedConfig:
    """Find the configuration of a model's folder, config.json or Hub repository, or make that of a size.

    Args:
        name: folder, file, Hub repository, or size: see [`find_size`].
        dropout: hidden and attention dropout of a size; a saved configuration, and so a teacher's, has its own.
        teacher: of a student whose name starts with `teacher-`.
        where: says where a saved configuration is: see [`file_arguments`].
        bert: more fields of a size's `BertConfig`, such as `vocab_size`.

    Returns:
        The configuration; a size is a BERT with heads of width 64.

    Raises:
        OSError: there is none.
        ValueError: a teacher's is needed, and it is not given or has no such student.
    """
    if (size := student_size(name)) is not None:
        if teacher is None:
            raise ValueError(
                f"{name!r} is a student with blocks or the configuration of its teacher, but no teacher is given; name "
                "it with --teacher, or give a size such as bert-6-768."
            )
        return student_config(teacher, size[0], hidden_size=size[1])
    if (size := find_size(name)) is not None:
        layers, hidden = size
        return BertConfig(
            num_hidden_layers=layers,
            hidden_size=hidden,
            num_attention_heads=max(1, hidden // 64),
            intermediate_size=4 * hidden,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            **bert,
        )
    try:
        return AutoConfig.from_pretrained(name, **(where or {}))
    except (OSError, ValueError) as error:
        raise OSError(
            f"{name!r} has no configuration within reach; give a model's folder, a config.json, a Hub model, or a "
            f"size: {', '.join(SIZES)}, bert-LAYERS-HIDDEN. ({str(error).splitlines()[0]})"
        ) from error


def find_teachers(options: PlanArguments, args: CurriculumDistillationConfig) -> list[str]:
    """Find the teachers that the run will load, in the order in which they teach.

    Args:
        options: with a teacher.
        args: `method="progressive"` means the checkpoints in the teacher's folder.

    Returns:
        Their names; a single one, unless the method is `progressive`.

    Raises:
        ValueError: the folder of a progressive teacher has no checkpoints.
    """
    name = options.teacher_source
    return find_checkpoints(name) if args.method == "progressive" else [name]


def build_models(options: PlanArguments, args: CurriculumDistillationConfig, tokenizer: Any) -> tuple[str, DryRun]:
    """Build student and teacher as the run will have them, without values, and a micro-batch for them.

    Args:
        options: names of both models, their task, and the shape of an example.
        args: the run's configuration.
        tokenizer: gives models that are named by size their vocabulary; None: the teacher does.

    Returns:
        A description of the models, and both with the shape of their micro-batches.

    Raises:
        OSError: a configuration is not within reach.
        ValueError: a model is of a kind that is not planned.
    """
    if args.pooling is not None and options.task != "Embeddings":
        raise ValueError(
            f"pooling is {args.pooling!r}, but task is {options.task!r}; states are pooled of models without a head: "
            "set task=Embeddings, or leave pooling out."
        )
    of_student, teacher_config = _find_configs(options, args, tokenizer)
    auto, teacher = TASKS[options.task], None
    online = args.method == "online"
    mode = FakeTensorMode()
    with mode:
        if student_size(options.student) is None:
            student = _make_model(auto, of_student, args)
        else:  # as the run makes it, which can refuse what the configuration allows
            student = make_student(options.student, _make_model(auto, teacher_config, args))
        student = PartialForward(student.train())
        _enable_checkpointing(student.model, args)
        if teacher_config is not None:
            dtype = (args.teacher_model_init_kwargs or {}).get("dtype", args.teacher_dtype)
            dtype = "float32" if online else None if dtype == "auto" else dtype
            teacher = (OnlineTeacher if online else Teacher)(_make_model(auto, teacher_config, args, dtype))
    models = {"student": student, "teacher": teacher.partial_forward} if teacher else {"student": student}
    detail = "; ".join(f"{who} {describe_model(one.model)}" for who, one in models.items())
    batch_size, length = args.per_device_train_batch_size, options.block_size
    ids_shape = labels_shape = batch_size, length
    if options.task == "MultipleChoice":
        ids_shape = batch_size, options.num_choices, length
    num_rows = batch_size * round(options.mlm_probability * (length - predicts_next_token(student.model)))
    if options.task not in ("MaskedLM", "CausalLM", "TokenClassification"):  # whose labels are of examples, or none
        labels_shape, num_rows = (batch_size,), batch_size * (head_of(student.model).rows_per_example or 1)
    return detail, DryRun(mode, student, teacher, args, ids_shape, labels_shape, num_rows)


def num_positions(model: PreTrainedModel) -> int | None:
    """Return the number of tokens that a model's table of positions has room for.

    Args:
        model: with or without values.

    Returns:
        The number of tokens; None if the model has no such table, because it computes positions.
    """
    size, inputs = getattr(model.config, "max_position_embeddings", None), model.get_input_embeddings()
    for table in model.modules():
        # OPT and BART keep two more rows; RoBERTa's positions start after the one for padding
        if isinstance(table, nn.Embedding) and table is not inputs and table.num_embeddings in (size, (size or 0) + 2):
            return size if table.padding_idx is None else size - table.padding_idx - 1
    return None


def _find_configs(
    options: PlanArguments, args: CurriculumDistillationConfig, tokenizer: Any
) -> tuple[PreTrainedConfig, PreTrainedConfig | None]:
    """The student's and the teacher's; a size takes the tokenizer's vocabulary, else the teacher's."""
    vocabulary, teacher_config = {} if tokenizer is None else {"vocab_size": len(tokenizer)}, None
    if options.teacher_source:
        teacher_config = find_config(find_teachers(options, args)[-1], options.dropout, **vocabulary)
        vocabulary = vocabulary or {"vocab_size": getattr(teacher_config, "vocab_size", None)}
    return find_config(options.student, options.dropout, teacher_config, **vocabulary), teacher_config


def _make_model(
    auto: Any, config: PreTrainedConfig, args: CurriculumDistillationConfig, dtype: str | None = None
) -> PreTrainedModel:
    other = f"A {config.model_type} is no single stack of blocks that reads tokens; no other is planned."
    if config.is_encoder_decoder or not hasattr(config, "vocab_size"):
        raise ValueError(other)
    if getattr(config, "num_hidden_layers", 0) > 10_000:
        raise ValueError(f"The model has {config.num_hidden_layers} blocks, more than any that is trained; correct it.")
    try:
        with no_init_weights():
            model = auto.from_config(config, **({"dtype": getattr(torch, dtype)} if dtype else {}))
    except ValueError as error:
        reason = str(error).split(".\n")[0]
        raise ValueError(f"There is no {auto.__name__} of type {config.model_type} ({reason}); set task.") from error
    if model.main_input_name != "input_ids":  # a speech model may have a vocabulary, too
        raise ValueError(other)
    model.tie_weights()
    if args.attn_implementation is not None:
        model.set_attn_implementation(args.attn_implementation)
    return model


def _enable_checkpointing(student: PreTrainedModel, args: CurriculumDistillationConfig) -> None:
    for name in ("activation_checkpointing", "gradient_checkpointing"):  # newer releases of transformers, older ones
        if getattr(args, name, False):
            getattr(student, f"{name}_enable")(getattr(args, f"{name}_kwargs"))
            return
