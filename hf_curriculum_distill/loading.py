"""From what was given as teacher to who teaches: loaded for the student's task, checked against it, placed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto
from transformers.utils import cached_file

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
        return teacher.to(device=args.device, dtype=dtype)

    def load(name: str) -> PreTrainedModel:
        return place(load_teacher(name, student, args.teacher_dtype), name)

    if isinstance(teacher_model, PreTrainedModel):
        kind = OnlineTeacher if args.method == "online" else FrozenTeacher
        return kind(place(teacher_model))
    if isinstance(teacher_model, (str, os.PathLike)):
        name = os.fspath(teacher_model)
        if args.method == "progressive":
            return CheckpointTeacher(find_checkpoints(name), load, args.teacher_schedule)
        kind = OnlineTeacher if args.method == "online" else FrozenTeacher
        return kind(load(name), name)
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
    return CheckpointTeacher([os.fspath(folder) for folder in folders], load, args.teacher_schedule)


def load_teacher(name: str, student: PreTrainedModel, dtype: str | None = None) -> PreTrainedModel:
    """Load a teacher for the student's task from a folder or the Hub.

    Raises:
        OSError: there is no such model.
        ValueError: the checkpoint has no weights for the task's head, which would leave them random.
    """
    task = next((auto for auto, names in _TASKS.items() if type(student).__name__ in names.values()), None)
    auto = type(student) if task is None else getattr(transformers, task)
    kwargs = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    model, info = auto.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
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
            outputs are not classes.
    """
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


def _has_tokenizer(name: str) -> bool:
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
    lenient = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return any(cached_file(name, file, **lenient) for file in files)
