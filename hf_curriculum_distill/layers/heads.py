"""What a model is for: what its labels and the rows of its logits are, by its class and configuration."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_curriculum_distill.layers.adapted import transformers_model

ONE_ROW_PER_EXAMPLE = tuple(f"{kind}Classification" for kind in ("Sequence", "Image", "Audio", "Video"))

_CAUSAL = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())

# Causal language models whose own loss compares the logits at position `i` with label `i`: the data must be shifted.
_LABELS_IN_PLACE = {
    "BartForCausalLM",
    "BigBirdPegasusForCausalLM",
    "BlenderbotForCausalLM",
    "BlenderbotSmallForCausalLM",
    "CpmAntForCausalLM",
    "MBartForCausalLM",
    "MarianForCausalLM",
    "MusicgenForCausalLM",
    "MusicgenMelodyForCausalLM",
    "MvpForCausalLM",
    "PLBartForCausalLM",
    "PegasusForCausalLM",
    "ProphetNetForCausalLM",
    "TrOCRForCausalLM",
    "WhisperForCausalLM",
    "XLMWithLMHeadModel",
    "XLNetLMHeadModel",
}


def predicts_next_token(model: nn.Module) -> bool:
    """Whether logits at position `i` belong to the label at `i + 1` (the model's own loss shifts the labels).

    Text, vision-language and audio-language decoders do. transformers has no single place that says so; before
    training, [`label_loss_mismatch`] compares what these names say with the model's own loss.
    """
    names = _class_names(model)
    if getattr(model.config, "is_encoder_decoder", False) or not names.isdisjoint(_LABELS_IN_PLACE):
        return False
    shifts = LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss
    return shifts or not names.isdisjoint(_CAUSAL)


def decodes_labels(model: nn.Module) -> bool:
    """Whether the labels are the decoder's tokens, as they are for encoder-decoders except classifiers."""
    return getattr(model.config, "is_encoder_decoder", False) and not _is_for(model, "Classification")


def is_ctc(model: nn.Module) -> bool:
    """Whether the model transcribes audio with CTC: one row of logits for each frame, and no label for a frame."""
    return _is_for(model, "ForCTC")


def _class_names(model: nn.Module) -> frozenset[str]:
    """The names of the model's class and of its bases, because FSDP2 replaces the class by a subclass."""
    return _names_of(type(transformers_model(model)))


@functools.cache
def _names_of(model_class: type) -> frozenset[str]:
    return frozenset(base.__name__ for base in model_class.__mro__)


def _is_for(model: nn.Module, task: str) -> bool:
    return _has_name_with(type(transformers_model(model)), task)


@functools.cache
def _has_name_with(model_class: type, part: str) -> bool:
    return any(part in name for name in _names_of(model_class))


def num_classes(model: nn.Module) -> int | None:
    """The number of classes in a row of the model's logits; None if its configuration does not say."""
    model = transformers_model(model)
    if _is_for(model, "Classification"):
        return model.config.num_labels
    return getattr(model.config.get_text_config(), "vocab_size", None)


def balances_experts(model: nn.Module) -> bool:
    """Whether the model is a mixture of experts whose routers have a loss of their own."""
    return bool(getattr(model.config.get_text_config(), "output_router_logits", False))


def auxiliary_loss(model: nn.Module, outputs: Mapping[str, Any]) -> Tensor | float:
    """The load-balancing loss that a mixture of experts adds to its task loss, with its weight.

    It is a scalar, with gradients; 0 for other models, and unless the configuration sets `output_router_logits`.

    Args:
        outputs: what the model's forward returned.
    """
    config = model.config.get_text_config()
    weight = getattr(config, "router_aux_loss_coef", None) or getattr(config, "aux_loss_coef", 0.0)
    if not balances_experts(model) or outputs.get("aux_loss") is None:
        return 0.0
    return weight * outputs["aux_loss"]
