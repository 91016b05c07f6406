"""Load the teacher for the student's task, check it against the student, and place it on its device."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto
from transformers.utils import cached_file

from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.layers.adapted import is_quantised, transformers_model
from hf_curriculum_distill.layers.heads import CLASSES, head_of
from hf_curriculum_distill.layers.weights import check_finite_weights, check_one_device
from hf_curriculum_distill.logs import get_logger
from hf_curriculum_distill.stages import Stage
from hf_curriculum_distill.teachers.checkpoints import CheckpointTeacher, find_checkpoints
from hf_curriculum_distill.teachers.online import OnlineTeacher
from hf_curriculum_distill.teachers.pretrained import LENIENT, forget_unused, load_pretrained
from hf_curriculum_distill.teachers.teacher import Teacher, has_head
from hf_curriculum_distill.teachers.vocabularies import share_vocabulary, shared_vocabulary, vocabulary_sizes

logger = get_logger(__name__)

# by auto class: the model classes of its task
_TASKS = {
    "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForImageTextToText": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForImageClassification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForAudioClassification": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "AutoModelForMultipleChoice": modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
}
# tasks whose models have logits of several kinds, or none
_OTHER_TASKS = {"AutoModelForPreTraining": modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES}

TeacherModel = PreTrainedModel | str | os.PathLike | Sequence[str | os.PathLike]


def prepare_teacher(
    teacher_model: TeacherModel,
    student: PreTrainedModel,
    args: CurriculumDistillationConfig,
    processing_class: Any = None,
) -> Teacher:
    """The teacher for `args.method`, loaded, checked against the student and placed on `args.device`.

    Args:
        teacher_model: a model, its name or folder, or for `method="progressive"` a list or folder of checkpoints.
        processing_class: the student's tokenizer or processor, which is compared with the teacher's.

    Raises:
        ValueError: the teacher does not fit the student or the method, or a folder has no checkpoints.
        OSError: there is no such model.
    """
    given = teacher_model
    check_finite_weights(student, "student")
    student = transformers_model(student)
    if (teacher_model := transformers_model(teacher_model)) is not given and args.method == "online":
        raise ValueError(
            f"teacher_model is a {type(given).__name__}, but an online teacher is saved and read again as a model "
            "without adapters; pass its merge_and_unload()."
        )
    teacher = _make_teacher(teacher_model, student, args, processing_class)
    share_vocabulary(student, teacher, processing_class)
    teacher.fingerprint  # noqa: B018  before anything trains the weights
    return teacher


def _make_teacher(
    teacher_model: TeacherModel, student: PreTrainedModel, args: CurriculumDistillationConfig, processing_class: Any
) -> Teacher:
    dtype = None if args.teacher_dtype is None else getattr(torch, args.teacher_dtype)

    def place(teacher: PreTrainedModel, name: str | None = None) -> PreTrainedModel:
        check_teacher(student, teacher, processing_class, name, args.matches_logits)
        check_one_device(teacher, "teacher", args.device)
        if any(parameter.is_meta for parameter in teacher.parameters()):
            check_finite_weights(teacher, "teacher")  # raises
        where = {"device": args.device}
        if is_quantised(teacher):
            _check_quantised(teacher, args)
        elif dtype is not None:
            where["dtype"] = dtype
        teacher = teacher.to(**where)
        if args.attn_implementation is not None:
            teacher.set_attn_implementation(args.attn_implementation)
        check_finite_weights(teacher, f"teacher {name!r}" if name else "teacher")
        return teacher

    def load(name: str) -> PreTrainedModel:
        return place(
            load_teacher(
                name,
                student,
                args.teacher_dtype,
                init_kwargs=args.teacher_model_init_kwargs,
                needs_head=needs_head(args),
            ),
            name,
        )

    if isinstance(teacher_model, PreTrainedModel):
        if args.teacher_model_init_kwargs is not None:
            raise ValueError(
                f"teacher_model_init_kwargs was given, but teacher_model is a {type(teacher_model).__name__} that is "
                "loaded already; pass its name or folder, or leave teacher_model_init_kwargs out."
            )
        kind = OnlineTeacher if args.method == "online" else Teacher
        return kind(place(teacher_model), stack=args.layer_stack)
    if isinstance(teacher_model, (str, os.PathLike)):
        name = os.fspath(teacher_model)
        if args.method == "progressive":
            return CheckpointTeacher(find_checkpoints(name), load, args.teacher_schedule, args.layer_stack)
        kind = OnlineTeacher if args.method == "online" else Teacher
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


def needs_head(args: CurriculumDistillationConfig) -> bool:
    """Whether a teacher needs a head, for a divergence from its logits or because it learns from labels itself."""
    if args.pooling is not None:
        return False
    if args.stages is None or args.method == "online":
        return args.method not in ("labels", "hidden")
    return any(Stage(**stage).kl_weight for stage in args.stages)


def load_teacher(
    name: str,
    student: PreTrainedModel,
    dtype: str | None = None,
    without_values: bool = False,
    init_kwargs: Mapping[str, Any] | None = None,
    needs_head: bool = True,
) -> PreTrainedModel:
    """Load a teacher for the student's task from a folder or the Hub: a whole model, or PEFT adapters with their base.

    Args:
        name: a folder, or a name on the Hub.
        dtype: of its weights, for instance "bfloat16"; None for that of the checkpoint.
        without_values: only check that the teacher could be loaded, from the names and shapes of tensors in local
            files; of safetensors files only the header is read.
        init_kwargs: further arguments of `from_pretrained`: see the config's `teacher_model_init_kwargs`.
        needs_head: whether the teacher's logits are needed; if not, a checkpoint without the task's head gives a model
            without one.

    Raises:
        OSError: there is no such model, or its files are damaged.
        ValueError: the model is of another task or needs its own code, or the checkpoint lacks weights (of the task's
            head, for instance), which would be random, or has blocks that its configuration leaves out.
    """
    if os.path.isfile(name):  # transformers' own error for it depends on what is installed
        raise OSError(f"The teacher {name!r} cannot be loaded: it is a file; name the folder that holds it.")
    task = next((auto for auto, names in _TASKS.items() if type(student).__name__ in names.values()), None)
    auto = type(student) if task is None else getattr(transformers, task)
    kwargs = {"trust_remote_code": False, **(init_kwargs or {})}
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if without_values:
        kwargs |= {"device_map": "meta", "local_files_only": True}
    if dtype is not None:
        kwargs["dtype"] = getattr(torch, dtype)
    if "gguf_file" in kwargs and hasattr(transformers, "GgufConfig"):  # earlier releases always unpack the weights
        kwargs.setdefault("quantization_config", transformers.GgufConfig(dequantize=True))
    model, info = load_pretrained(name, auto, student, kwargs)
    if (info["missing_keys"] or info["mismatched_keys"]) and not needs_head:
        model, info = load_pretrained(name, transformers.AutoModel, student, kwargs)
        forget_unused(model, info)
    own = {_any_block(key) for key in model.state_dict()}
    if extra := sorted(key for key in info["unexpected_keys"] if _any_block(key) in own):
        raise ValueError(
            f"The teacher {name!r} has weights for {extra[0]}, a block that its config.json leaves out, so it would "
            "be another model. Restore the configuration it was saved with."
        )
    if info["missing_keys"] or info["mismatched_keys"]:
        lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise ValueError(
            f"The teacher {name!r} has no weights for {', '.join(lacking[:4])}{' ...' if len(lacking) > 4 else ''}; as "
            f"a {type(model).__name__} these would be random. Use a checkpoint that was trained for this task."
        )
    return model


def check_teacher(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    processing_class: Any = None,
    name: str | None = None,
    compares_logits: bool = True,
) -> None:
    """Check that the teacher reads the same inputs as the student, and that its logits have the same meaning.

    Args:
        processing_class: the student's tokenizer or processor.
        name: the name or folder that the teacher was loaded from; None if it was passed as a model.
        compares_logits: whether logits are matched; hidden states alone can be those of any task.

    Raises:
        ValueError: the models share parameters, their vocabularies, labels or tokenizers differ, their outputs have no
            logits, or they are of different tasks.
    """
    compares_heads = compares_logits and has_head(teacher)
    if compares_logits:
        _check_tasks(student, teacher, compares_heads)
    ours = {id(parameter) for parameter in student.parameters()}
    if any(id(parameter) in ours for parameter in teacher.parameters()):
        raise ValueError("The teacher shares parameters with the student, so it would be trained; pass a copy.")
    if compares_heads and "Classification" in type(student).__name__:
        _check_labels(student, teacher)
    vocabularies, shared = vocabulary_sizes(student, teacher), shared_vocabulary(student, teacher, processing_class)
    if len(vocabularies) > 1 and shared is None:
        raise ValueError(
            f"The student's vocabulary has {vocabularies[0]} entries and the teacher's {vocabularies[1]}; they must "
            "read and predict the same tokens. Build the student with the teacher's tokenizer and vocab_size."
        )
    tokenizer = getattr(processing_class, "tokenizer", processing_class)  # processors have one
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        _check_tokenizers(tokenizer, teacher.config, name)


def check_head(teacher: PreTrainedModel, stages: Sequence[Stage]) -> None:
    """Raise a `ValueError` if a stage needs the logits of a teacher without a head."""
    if not has_head(teacher) and (needing := [stage.name for stage in stages if stage.kl_weight]):
        raise ValueError(
            f"The teacher is a {type(teacher).__name__}, which has no head, but stage {needing[0]!r} needs its logits; "
            "use a checkpoint that was trained for the student's task, or match hidden states only, with explicit "
            "`stages`."
        )


def _check_labels(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Check that two classifiers have the same classes, or that both predict numbers."""
    kinds = [f"num_labels={m.config.num_labels} and problem_type={m.config.problem_type!r}" for m in (student, teacher)]
    for who, model, kind in (("student", student, kinds[0]), ("teacher", teacher, kinds[1])):
        other = model.config.problem_type in ("regression", "multi_label_classification")
        if head_of(model) is CLASSES and (other or model.config.num_labels == 1):
            raise ValueError(
                f"The {who} has {kind}; a divergence between class probabilities needs single-label classification "
                "with at least 2 classes."
            )
    if student.config.num_labels != teacher.config.num_labels:
        raise ValueError(
            f"The student has {student.config.num_labels} labels and the teacher {teacher.config.num_labels}; "
            "their logits can't be compared. Load both with the same num_labels."
        )
    if head_of(student) is not head_of(teacher):
        raise ValueError(
            f"The teacher has {kinds[1]}, but the student has {kinds[0]}, so that a row of their logits is "
            f"{head_of(teacher).name}, and {head_of(student).name}. Load both with the same problem_type."
        )
    names = [_label_names(model.config) for model in (student, teacher)]
    if None not in names and names[0] != names[1]:
        label2id = [{name: number for number, name in enumerate(labels)} for labels in names]
        raise ValueError(
            f"The student's label2id is {label2id[0]} and the teacher's {label2id[1]}; class numbers must mean the "
            "same. Load both with the same id2label and label2id."
        )


def _check_quantised(teacher: PreTrainedModel, args: CurriculumDistillationConfig) -> None:
    method = teacher.quantization_method
    how = f"The teacher is quantised ({getattr(method, 'value', method)})"
    if args.method in ("online", "progressive"):
        raise ValueError(
            f"{how}, but method={args.method!r} changes its weights; use a teacher that is not, or one of the methods "
            "that leave it alone."
        )
    if args.teacher_dtype is None:
        return
    packed = {tensor.dtype for tensor in teacher.parameters() if hasattr(tensor, "__tensor_flatten__")}
    if other := {teacher.dtype, *packed} - {getattr(torch, args.teacher_dtype)}:
        raise ValueError(
            f"{how} for computation in {min(map(str, other))}, but teacher_dtype is {args.teacher_dtype!r}, to which "
            "packed weights are not cast; quantise it in that dtype, or leave teacher_dtype out."
        )


def _check_tasks(student: PreTrainedModel, teacher: PreTrainedModel, compares_heads: bool) -> None:
    for who, model in (("student", student), ("teacher", teacher)):
        if not _tasks(model, _TASKS) and (other := _tasks(model, _OTHER_TASKS)):
            raise ValueError(
                f"The {who} is a {type(model).__name__} ({min(other)}), whose outputs are not one row of class logits "
                f"a token or an example; use a model of one of {', '.join(_TASKS)}, or match hidden states only, with "
                "method='hidden'."
            )
    tasks = [_tasks(model, _TASKS) for model in (student, teacher)]
    encodes_decodes = [bool(getattr(model.config, "is_encoder_decoder", False)) for model in (student, teacher)]
    if (compares_heads and all(tasks) and not tasks[0] & tasks[1]) or len(set(encodes_decodes)) > 1:
        described = [
            f"{type(m).__name__} ({', '.join(sorted(t)) or 'no known task'})"
            for m, t in zip((student, teacher), tasks, strict=True)
        ]
        raise ValueError(
            f"The student is a {described[0]} and the teacher a {described[1]}; their logits mean different things. "
            "Use two models of one task."
        )


def _tasks(model: PreTrainedModel, known: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The auto classes whose models include the class of this model, or a base of it."""
    names = {cls.__name__ for cls in type(model).__mro__}
    return {auto for auto, classes in known.items() if not names.isdisjoint(map(str, classes.values()))}


def _any_block(key: str) -> str:
    return re.sub(r"\.\d+\.", ".0.", key)


def _label_names(config: PreTrainedConfig) -> list[str | None] | None:
    """The names of the classes, in lower case and by number; None if they are the default names."""
    for names in (config.id2label or {}, {number: name for name, number in (config.label2id or {}).items()}):
        labels = {str(number): str(name).lower() for number, name in names.items()}  # keys from JSON are strings
        if any(name != f"label_{number}" for number, name in labels.items()):
            return [labels.get(str(number)) for number in range(config.num_labels)]
    return None


def _check_tokenizers(tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedConfig, name: str | None) -> None:
    """Compare with the teacher's tokenizer, in the folder or repository that its weights were loaded from."""
    origin, in_memory = name or getattr(teacher, "_name_or_path", ""), name is None
    revision = getattr(teacher, "_commit_hash", None)
    folder = tokenizer_folder(origin, revision, local_files_only=in_memory)
    if folder is None:
        return
    try:
        place, kwargs = folder if in_memory else name, {"revision": revision or "main", "trust_remote_code": False}
        theirs = AutoTokenizer.from_pretrained(place, **kwargs).get_vocab()
    except Exception as error:  # every tokenizer raises errors of its own
        logger.warning("The tokenizer of %s cannot be read, so it is not compared with yours: %s", origin, error)
        return
    ours = tokenizer.get_vocab()
    # tokens may have been added to a model in memory since it was loaded
    if theirs != ours and not (in_memory and theirs.items() <= ours.items()):
        raise ValueError(
            f"The tokenizer of {origin} and the processing_class map tokens to different ids; teacher and student must "
            "read the same ids. Pass the teacher's tokenizer as processing_class; if the teacher has been trained with "
            "another one since it was loaded, save both in one folder and name that."
        )


def tokenizer_folder(name: str, revision: str | None = None, **kwargs: Any) -> str | None:
    """The folder of the tokenizer that is saved beside a model's weights; None if there is none."""
    with suppress(OSError):  # neither a folder nor a possible name on the Hub
        for file in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
            if (path := cached_file(name, file, revision=revision, **LENIENT, **kwargs)) is not None:
                return os.path.dirname(path)
    return None
