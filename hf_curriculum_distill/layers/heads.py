"""What a model is for: what its labels and the rows of its logits are, by its class and configuration."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto import modeling_auto

from hf_curriculum_distill import losses
from hf_curriculum_distill.layers.adapted import transformers_model

ONE_ROW_PER_EXAMPLE = tuple(f"{kind}Classification" for kind in ("Sequence", "Image", "Audio", "Video"))


def _classes_for(*tasks: str) -> frozenset[str]:
    """The names of all model classes of some tasks, as transformers lists them."""
    names = [name for task in tasks for name in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").values()]
    return frozenset(one for name in names for one in ([name] if isinstance(name, str) else name))


_CAUSAL = _classes_for("CAUSAL_LM")
_FINDS_SPANS = _classes_for("QUESTION_ANSWERING", "DOCUMENT_QUESTION_ANSWERING")
_KNOWN = _classes_for("MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "CTC")
_KNOWN |= _classes_for("SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "NEXT_SENTENCE_PREDICTION", "MULTIPLE_CHOICE")
_KNOWN |= _classes_for("IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION") | _CAUSAL | _FINDS_SPANS

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


@dataclass(frozen=True)
class Head:
    """What the rows of logits of a task are. Losses, counts, metrics, plans and caches are all of such rows.

    A row is one choice among classes, `[classes]`, of which a softmax makes a distribution; or it is one number, or
    several that belong together.

    Args:
        name: what a row is, for messages.
        rows_per_example: the number of rows of an example; None if each token or each example has one, as the labels
            and the model's class say.
        num_classes: the number of classes of a row; None if the configuration or the batch says it.
        label_names: the inputs that are labels.
        output_names: the outputs that the logits are made of.
        has_float_labels: whether the model's own loss takes labels as floats.
        predicts_numbers: whether a row is a number, `[1]`, or an embedding, for which errors take the place of
            divergence and cross-entropy.
        to_logits: makes logits `[..., classes]` of these outputs. Their rows are all dimensions but the last.
        to_labels: makes the rows' labels, `[batch]` or `[batch, rows of an example]` and -100 where none counts, of the
            inputs, which hold all of `label_names`.
    """

    name: str
    rows_per_example: int | None = None
    num_classes: int | None = None
    label_names: tuple[str, ...] = ("labels",)
    output_names: tuple[str, ...] = ("logits",)
    has_float_labels: bool = False
    predicts_numbers: bool = False
    to_logits: Callable[..., Tensor] = lambda logits: logits
    to_labels: Callable[[Mapping[str, Any]], Tensor] = lambda inputs: inputs["labels"]

    def is_in(self, outputs: Any) -> bool:
        """Whether a model's outputs have the logits."""
        return not isinstance(outputs, Mapping) or all(outputs.get(name) is not None for name in self.output_names)

    def logits(self, outputs: Any, has_loss: bool = False) -> Tensor:
        """The logits, `[..., classes]`, among a model's outputs.

        Args:
            has_loss: whether a tuple of outputs begins with a loss.
        """
        if not isinstance(outputs, Mapping):
            return self.to_logits(*outputs[int(has_loss) :][: len(self.output_names)])
        return self.to_logits(*(outputs[name] for name in self.output_names))

    def labels(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """The rows' labels, `[batch]` or `[batch, rows of an example]`; None if the batch has none."""
        return self.to_labels(inputs) if all(inputs.get(name) is not None for name in self.label_names) else None

    def label_loss(
        self,
        logits: Tensor,
        labels: Tensor,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
    ) -> Tensor:
        """The loss that models of the task have themselves, summed over rows.

        Args:
            logits: `[rows, classes]`.
            labels: `[rows]`.
            label_smoothing, class_weights: see [`losses.cross_entropy`].
        """
        if self.predicts_numbers:
            return losses.squared_error(logits, labels)
        return losses.cross_entropy(logits, labels, label_smoothing, class_weights)


def _two_outcomes(logits: Tensor) -> Tensor:
    """Logits of "no" and "yes" for each class that an example may have, `[batch, classes, 2]`."""
    return torch.stack([torch.zeros_like(logits), logits], -1)


def _span_labels(inputs: Mapping[str, Any]) -> Tensor:
    """Where the span starts and ends, `[batch, 2]`; a token beyond the input does not count, as in the model's loss."""
    length = inputs["input_ids"].shape[1]
    spans = torch.stack([inputs["start_positions"].view(-1), inputs["end_positions"].view(-1)], 1).clamp(min=0)
    return spans.where(spans < length, -100)


# a class of each token or example, by number
CLASSES = Head("a class")
# where a span of tokens starts and where it ends
SPAN = Head(
    "a token of the text",
    rows_per_example=2,
    label_names=("start_positions", "end_positions"),
    output_names=("start_logits", "end_logits"),
    to_logits=lambda start, end: torch.stack([start, end], 1),
    to_labels=_span_labels,
)
# one of the texts of an example
CHOICE = Head("a choice", rows_per_example=1)
# what a model without a head makes of an example, by the config's `pooling`; no class of models stands for it
EMBEDDING = Head(
    "an embedding", rows_per_example=1, label_names=(), predicts_numbers=True, to_labels=lambda inputs: None
)


@functools.cache
def _classes_that_may_be_together(number: int) -> Head:
    """Whether an example has a class, for each class."""
    return Head(
        "yes or no for a class",
        rows_per_example=number,
        num_classes=2,
        has_float_labels=True,
        to_logits=_two_outcomes,
        to_labels=lambda inputs: inputs["labels"].long(),
    )


@functools.cache
def _numbers(number: int) -> Head:
    """The numbers of an example."""
    return Head(
        "a number",
        rows_per_example=number,
        num_classes=1,
        has_float_labels=True,
        predicts_numbers=True,
        to_logits=lambda logits: logits.unsqueeze(-1),
        to_labels=lambda inputs: inputs["labels"].view(-1, number),
    )


def head_of(model: nn.Module) -> Head:
    """What the rows of a model's logits are, by its class and, of a classifier of examples, its `problem_type`."""
    if not _class_names(model).isdisjoint(_FINDS_SPANS):
        return SPAN
    if _is_for(model, "ForMultipleChoice"):
        return CHOICE
    if not any(_is_for(model, task) for task in ONE_ROW_PER_EXAMPLE):
        return CLASSES
    config = transformers_model(model).config
    kind, number = getattr(config, "problem_type", None), config.num_labels
    if kind == "multi_label_classification":
        return _classes_that_may_be_together(number)
    if kind == "regression" or (kind is None and number == 1):
        return _numbers(number)
    return CLASSES


def has_known_head(model: nn.Module) -> bool:
    """Whether the model's class alone says what the rows of its logits are; of others their own loss may show it."""
    return not _class_names(model).isdisjoint(_KNOWN)


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
    if not getattr(model.config, "is_encoder_decoder", False) or not _reads_decoder_tokens(
        type(transformers_model(model))
    ):
        return False
    return head_of(model) is CLASSES and not _is_for(model, "Classification")


def makes_decoder_inputs_itself(model: nn.Module) -> bool:
    """Whether the model makes its decoder's tokens of the labels, though its configuration is no encoder-decoder's.

    So do BLIP and InstructBLIP, each in a way of its own, unless their language model has no encoder.
    """
    config = model.config
    decodes = getattr(config, "is_encoder_decoder", False) or getattr(config, "use_decoder_only_language_model", False)
    return not decodes and _reads_decoder_tokens(type(transformers_model(model)))


@functools.cache
def _reads_decoder_tokens(model_class: type) -> bool:
    """Whether the decoder reads tokens, and not, as of object detection, vectors of its own."""
    forwards = [vars(base)["forward"] for base in model_class.__mro__ if "forward" in vars(base)]
    return any("decoder_input_ids" in inspect.signature(forward).parameters for forward in forwards)


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
    model, head = transformers_model(model), head_of(model)
    if head is not CLASSES:
        return head.num_classes
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
