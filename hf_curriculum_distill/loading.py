"""From what was given as teacher to who teaches: loaded for the student's task, checked against it, placed."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto
from transformers.utils import cached_file

from hf_curriculum_distill.checks import check_finite_weights
from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.online import OnlineTeacher
from hf_curriculum_distill.teachers import CheckpointTeacher, FrozenTeacher, find_checkpoints

# auto class -> the class names it stands for
_TASKS = {
    "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForImageClassification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForAudioClassification": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
}
# tasks without one row of class logits a token or an example
_OTHER_TASKS = {
    "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "AutoModelForMultipleChoice": modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    "AutoModelForPreTraining": modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES,
}

TeacherModel = PreTrainedModel | str | os.PathLike | Sequence[str | os.PathLike]


def prepare_teacher(
    teacher_model: TeacherModel,
    student: PreTrainedModel,
    args: CurriculumDistillationConfig,
    processing_class: Any = None,
) -> FrozenTeacher:
    """The teacher for `args.method`, loaded, checked against the student and placed on `args.device`.

    Raises:
        ValueError: it doesn't fit the student or the method, or a folder holds no checkpoints.
        OSError: there is no such model.
    """
    dtype = None if args.teacher_dtype is None else getattr(torch, args.teacher_dtype)

    def place(teacher: PreTrainedModel, name: str | None = None) -> PreTrainedModel:
        check_teacher(student, teacher, processing_class, name)
        if any(parameter.is_meta for parameter in teacher.parameters()):
            check_finite_weights(teacher, "teacher")  # raises
        teacher = teacher.to(device=args.device, dtype=dtype)
        check_finite_weights(teacher, f"teacher {name!r}" if name else "teacher")
        return teacher

    def load(name: str) -> PreTrainedModel:
        return place(load_teacher(name, student, args.teacher_dtype), name)

    check_finite_weights(student, "student")
    if isinstance(teacher_model, PreTrainedModel):
        kind = OnlineTeacher if args.method == "online" else FrozenTeacher
        return kind(place(teacher_model), stack=args.layer_stack)
    if isinstance(teacher_model, (str, os.PathLike)):
        name = os.fspath(teacher_model)
        if args.method == "progressive":
            return CheckpointTeacher(find_checkpoints(name), load, args.teacher_schedule, args.layer_stack)
        kind = OnlineTeacher if args.method == "online" else FrozenTeacher
        return kind(load(name), name, args.layer_stack)
    folders = list(teacher_model) if isinstance(teacher_model, Sequence) else []
    if not folders or not all(isinstance(folder, (str, os.PathLike)) for folder in folders):
        raise ValueError(
            f"teacher_model is a {type(teacher_model).__name__}; pass a PreTrainedModel, its name or folder, or, for "
            "method='progressive', a list of folders."
        )
    if args.method != "progressive":
        raise ValueError(
            f"teacher_model is a list of {len(folders)} checkpoints, but method is {args.method!r}; one teacher is "
            "needed, or method='progressive'."
        )
    folders = [os.fspath(folder) for folder in folders]
    return CheckpointTeacher(folders, load, args.teacher_schedule, args.layer_stack)


def load_teacher(name: str, student: PreTrainedModel, dtype: str | None = None) -> PreTrainedModel:
    """Load a teacher for the student's task from a folder or the Hub.

    Raises:
        OSError: there is no such model, or its files are damaged.
        ValueError: it is of another task or needs code of its own, or the checkpoint has no weights for the task's
            head, which would leave them random, or has blocks that its configuration lacks.
    """
    task = next((auto for auto, names in _TASKS.items() if type(student).__name__ in names.values()), None)
    auto = type(student) if task is None else getattr(transformers, task)
    kwargs: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True, "trust_remote_code": False}
    if dtype is not None:
        kwargs["dtype"] = getattr(torch, dtype)
    try:
        model, info = auto.from_pretrained(name, **kwargs)
    except UnpicklingError as error:
        raise OSError(
            f"The teacher {name!r} has pickled weights that hold more than tensors; they are not loaded, because "
            "unpickling can run any code. Use a checkpoint saved as safetensors."
        ) from error
    except (OSError, SafetensorError) as error:
        raise OSError(f"The teacher {name!r} cannot be loaded: {error}") from error
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(
            f"The teacher {name!r} cannot be loaded as the student's {auto.__name__}: {error} A model that needs code "
            "of its own can be loaded by you and passed as teacher_model."
        ) from error
    own = {_any_block(key) for key in model.state_dict()}
    if extra := sorted(key for key in info["unexpected_keys"] if _any_block(key) in own):
        raise ValueError(
            f"The teacher {name!r} has weights for {extra[0]}, a block that its config.json leaves out, so it would "
            "answer as another model. Restore the configuration it was saved with."
        )
    if info["missing_keys"] or info["mismatched_keys"]:
        lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise ValueError(
            f"The teacher {name!r} has no weights for {', '.join(lacking[:4])}{' ...' if len(lacking) > 4 else ''}; as "
            f"a {type(model).__name__} these would be random. Use a checkpoint that was trained for this task."
        )
    return model


def check_teacher(
    student: PreTrainedModel, teacher: PreTrainedModel, processing_class: Any = None, name: str | None = None
) -> None:
    """Whether the teacher's answers mean what the student's do.

    Raises:
        ValueError: they share parameters, or their vocabularies, numbers of labels or tokenizers differ, or their
            outputs are not classes or belong to different tasks.
    """
    _check_tasks(student, teacher)
    ours = {id(parameter) for parameter in student.parameters()}
    if any(id(parameter) in ours for parameter in teacher.parameters()):
        raise ValueError("The teacher shares parameters with the student, so it would be trained; pass a copy.")
    if "Classification" in type(student).__name__:
        for who, model in (("student", student), ("teacher", teacher)):
            kind = getattr(model.config, "problem_type", None)
            if model.config.num_labels == 1 or kind in ("regression", "multi_label_classification"):
                raise ValueError(
                    f"The {who} has num_labels={model.config.num_labels} and problem_type={kind!r}; a divergence "
                    "between class probabilities needs single-label classification with at least 2 classes."
                )
        if student.config.num_labels != teacher.config.num_labels:
            raise ValueError(
                f"The student has {student.config.num_labels} labels and the teacher {teacher.config.num_labels}; "
                "their logits can't be compared. Load both with the same num_labels."
            )
        names = [{label.lower() for label in m.config.label2id} for m in (student, teacher)]
        default = {f"label_{i}" for i in range(student.config.num_labels)}
        if default not in names and student.config.label2id != teacher.config.label2id:
            raise ValueError(
                f"The student's label2id is {student.config.label2id} and the teacher's {teacher.config.label2id}; "
                "class numbers must mean the same. Load both with the same label2id."
            )
    vocabularies = [getattr(m.config.get_text_config(), "vocab_size", None) for m in (student, teacher)]
    if None not in vocabularies and vocabularies[0] != vocabularies[1]:
        raise ValueError(
            f"The student's vocabulary has {vocabularies[0]} entries and the teacher's {vocabularies[1]}; they must "
            "read and predict the same tokens. Build the student with the teacher's tokenizer and vocab_size."
        )
    comparable = isinstance(processing_class, PreTrainedTokenizerBase) and name is not None and _has_tokenizer(name)
    if comparable and AutoTokenizer.from_pretrained(name).get_vocab() != processing_class.get_vocab():
        raise ValueError(
            f"The tokenizer of {name} and the processing_class map tokens to different ids; teacher and student must "
            "read the same ids. Pass the teacher's tokenizer as processing_class."
        )


def _check_tasks(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    for who, model in (("student", student), ("teacher", teacher)):
        if not _tasks(model, _TASKS) and (other := _tasks(model, _OTHER_TASKS)):
            raise ValueError(
                f"The {who} is a {type(model).__name__} ({min(other)}), whose answers are not one row of class logits "
                f"a token or an example; use a model of one of {', '.join(_TASKS)}."
            )
    tasks = [_tasks(model, _TASKS) for model in (student, teacher)]
    encodes_decodes = [bool(getattr(model.config, "is_encoder_decoder", False)) for model in (student, teacher)]
    if (all(tasks) and not tasks[0] & tasks[1]) or len(set(encodes_decodes)) > 1:
        described = [
            f"{type(m).__name__} ({', '.join(sorted(t)) or 'no known task'})"
            for m, t in zip((student, teacher), tasks, strict=True)
        ]
        raise ValueError(
            f"The student is a {described[0]} and the teacher a {described[1]}; their answers mean different things. "
            "Use two models of one task."
        )


def _tasks(model: PreTrainedModel, known: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The auto classes that a model, or what it is derived from, belongs to."""
    names = {cls.__name__ for cls in type(model).__mro__}
    return {auto for auto, classes in known.items() if not names.isdisjoint(map(str, classes.values()))}


def _any_block(key: str) -> str:
    return re.sub(r"\.\d+\.", ".0.", key)


def _has_tokenizer(name: str) -> bool:
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
    lenient = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return any(cached_file(name, file, **lenient) for file in files)
