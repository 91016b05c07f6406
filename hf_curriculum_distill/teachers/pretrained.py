"""`from_pretrained` for teachers: whole models and PEFT adapters, with errors that name the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pickle import UnpicklingError
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, cached_file, extract_commit_hash

from hf_curriculum_distill.layers.adapted import transformers_model
from hf_curriculum_distill.layers.forward import PartialForward

_WHERE = ("revision", "subfolder", "cache_dir", "force_download", "local_files_only")
# of `cached_file`, which then returns None
LENIENT = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
_PREFIX = "base_model.model."  # of the names in an adapter's file


def file_arguments(kwargs: Mapping[str, Any] | None, of_tokenizer: bool = False) -> dict[str, Any]:
    """Those arguments of `from_pretrained` that say where a teacher's files are; the others are about the model.

    Args:
        kwargs: all arguments, as the config's `teacher_model_init_kwargs`.
        of_tokenizer: whether its tokenizer is looked for, which lies beside the subfolders of models.
    """
    return {n: value for n, value in (kwargs or {}).items() if n in _WHERE and not (of_tokenizer and n == "subfolder")}


def load_pretrained(
    name: str, auto: Any, student: PreTrainedModel, kwargs: Mapping[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model from a folder or the Hub, or adapters with the model that they belong to.

    Args:
        name: a folder, or a name on the Hub.
        auto: the class whose `from_pretrained` loads it.
        student: says how many classes the head has, where adapters are on a base without one.
        kwargs: those of `from_pretrained`, among them `output_loading_info`.

    Returns:
        The model, without PEFT's wrapper; and what it lacked, as `from_pretrained` says it.

    Raises:
        OSError: there is no such model, or its files are damaged.
        ValueError: it is of another kind, needs its own code, or an argument is unknown.
    """
    where = file_arguments(kwargs)
    try:
        if _has_adapters(name, where):
            classes = {"num_labels": student.config.num_labels} if "Classification" in auto.__name__ else {}
            return _load_with_adapters(name, auto, classes | kwargs, where)
        model, info = auto.from_pretrained(name, **kwargs)
        file = cached_file(name, CONFIG_NAME, **where, **LENIENT)  # newer releases don't say which commit they loaded
        vars(model.config).setdefault("_commit_hash", extract_commit_hash(file, None))
        return model, info
    except UnpicklingError as error:
        raise OSError(
            f"The teacher {name!r} has pickled weights that hold more than tensors; they are not loaded, because "
            "unpickling can run any code. Use a checkpoint saved as safetensors."
        ) from error
    except (OSError, SafetensorError, ImportError) as error:  # ImportError: no quantisation library, or no peft
        raise OSError(f"The teacher {name!r} cannot be loaded: {error}") from error
    except (ValueError, StrictDataclassError, TypeError) as error:  # TypeError: an argument that nothing takes
        raise ValueError(
            f"The teacher {name!r} cannot be loaded as the student's {auto.__name__}: {error} A model that needs code "
            "of its own can be loaded by you and passed as teacher_model."
        ) from error


def _has_adapters(name: str, where: Mapping[str, Any]) -> bool:
    with suppress(OSError):  # neither a folder nor a possible name on the Hub: `from_pretrained` says it
        return cached_file(name, "adapter_config.json", **where, **LENIENT) is not None
    return False


def _load_with_adapters(
    name: str, auto: Any, kwargs: Mapping[str, Any], where: Mapping[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    from peft import PeftConfig, PeftModel
    from peft.utils import get_peft_model_state_dict, load_peft_weights

    config = PeftConfig.from_pretrained(name, **where)
    of_base = {n: value for n, value in kwargs.items() if n not in ("revision", "subfolder")}
    revision = {} if config.revision is None else {"revision": config.revision}
    model, info = auto.from_pretrained(config.base_model_name_or_path, **of_base, **revision)
    try:
        adapted = PeftModel.from_pretrained(model, name, **where)
    except RuntimeError as error:  # sizes differ; it has a line for each tensor
        raise ValueError(" ".join(str(error).split())) from error
    except KeyError as error:
        raise ValueError(f"its adapters have no weights for {error.args[0].removeprefix(_PREFIX)}.") from error
    saved = load_peft_weights(name, device="cpu", **where).keys()
    missing = {key for key in info["missing_keys"] if _PREFIX + key not in saved}
    missing |= {key.removeprefix(_PREFIX) for key in get_peft_model_state_dict(adapted).keys() - saved}
    return transformers_model(adapted), info | {"missing_keys": missing}


def forget_unused(model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Of the weights that a checkpoint lacked, make those after the last block zero.

    No stage that matches hidden states reads them, and so a resumed run finds the same teacher.

    Args:
        info: what `from_pretrained` says; these names are removed from its `missing_keys`.
    """
    forward = PartialForward(model)
    read = {id(parameter) for parameter in forward.parameters_before(forward.depth)}
    for key in set(info["missing_keys"]):
        if id(parameter := model.get_parameter(key)) not in read:
            parameter.data.zero_()
            info["missing_keys"].remove(key)
