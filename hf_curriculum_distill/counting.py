"""What counts in a batch: positions for hidden states, rows for logits.

Losses are sums over what counts, divided by how much counted over the whole accumulated batch; these are the two
sides of that fraction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_ONE_ANSWER_PER_EXAMPLE = ("SequenceClassification", "ImageClassification", "AudioClassification")
_ONE_ANSWER_PER_TOKEN = ("ForMaskedLM", "ForTokenClassification")


def predicts_next_token(model: nn.Module) -> bool:
    """Whether logits at position `i` belong to the label at `i + 1` (causal language models shift inside the loss)."""
    if getattr(model.config, "is_encoder_decoder", False):
        return False
    # of any base: FSDP2 makes a class of its own of the one that it shards
    is_causal = any(base.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for base in type(model).__mro__)
    return is_causal or getattr(model, "loss_type", None) == "ForCausalLM"


def answers_per_token(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether the model's logits have one row a token, `[batch, length, classes]`, not one an example."""
    if (labels := inputs.get("labels")) is not None:
        return labels.dim() > 1
    return not any(task in type(model).__name__ for task in _ONE_ANSWER_PER_EXAMPLE)


def counted_rows(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """Which rows of the flattened logits count, and their labels.

    With `labels` (`[batch]` or `[batch, length]`) the rows whose label is not -100; without, every row that is not
    padding.

    Returns:
        row numbers `[rows]` into `logits.flatten(0, -2)` and labels `[rows]`; None for all rows, and for no labels.

    Raises:
        ValueError: the labels are no class numbers.
    """
    labels = _aligned_labels(model, inputs)
    if labels is not None:
        rows = labels.flatten().ne(-100).nonzero().squeeze(1)
        return rows, labels.flatten()[rows]
    if getattr(model.config, "is_encoder_decoder", False) and answers_per_token(model, inputs):
        raise ValueError(
            f"The batch has no labels, but the logits of {type(model).__name__} answer its decoder's tokens, which "
            "labels choose; check the collator."
        )
    mask = _token_mask(inputs)
    if mask is None or not answers_per_token(model, inputs):
        return None, None
    return mask.flatten().nonzero().squeeze(1), None


def check_batch(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Whether the losses read a batch as it was meant.

    Shapes are compared always, values only where they lie in host memory: nothing waits for the device.

    Raises:
        ValueError: an input is missing or empty, or tokens, attention mask and labels do not fit each other or the
            model.
    """
    name, classes = model.main_input_name, _num_classes(model)
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
    if labels is None:
        return
    if labels.is_floating_point() or labels.dim() not in (1, 2):
        raise ValueError(
            f"labels are {_describe(labels)}; class numbers of shape [batch] or [batch, length] are needed to match "
            "the teacher's class probabilities."
        )
    per_token = predicts_next_token(model) or _is_for(model, _ONE_ANSWER_PER_TOKEN)
    wanted = main.shape if per_token else main.shape[: 1 if _is_for(model, _ONE_ANSWER_PER_EXAMPLE) else 0]
    if len(labels) != len(main) or (wanted and labels.shape != wanted):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} but {name} {tuple(main.shape)}; {type(model).__name__} needs one "
            f"label {'a token' if per_token else 'an example'}. Check the collator."
        )
    _check_values(labels.where(labels != -100, 0), "labels", classes, " (-100: does not count)")


def _check_values(numbers: Tensor, name: str, end: int | None, beside: str = "") -> None:
    if end is None or numbers.device.type != "cpu":
        return
    low, high = (value.item() for value in numbers.aminmax())
    if low < 0 or high >= end:
        raise ValueError(
            f"{name} hold {low if low < 0 else high}, but the model knows 0 to {end - 1}{beside}. Check that data, "
            "tokenizer and model belong together."
        )


def _num_classes(model: nn.Module) -> int | None:
    if _is_for(model, ("Classification",)):
        return model.config.num_labels
    return getattr(model.config.get_text_config(), "vocab_size", None)


def _is_for(model: nn.Module, tasks: tuple[str, ...]) -> bool:
    return any(task in cls.__name__ for cls in type(model).__mro__ for task in tasks)


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def count(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """`[number of positions, number of rows]` that count in a batch, without waiting for the device.

    Text: positions are the tokens that are not padding. Images and audio: one an example, shared equally by its
    hidden states (see [`position_weights`]).

    Raises:
        ValueError: see [`check_batch`].
    """
    check_batch(model, inputs)
    labels, mask = _aligned_labels(model, inputs), _token_mask(inputs)
    main = inputs[model.main_input_name]
    positions = mask.sum() if mask is not None else torch.full((), _num_units(inputs, main), device=main.device)
    if labels is not None:
        rows = labels.ne(-100).sum()
    else:
        rows = positions if answers_per_token(model, inputs) else torch.full((), len(main), device=main.device)
    return torch.stack([positions, rows])


def position_weights(model: nn.Module, inputs: Mapping[str, Any], hidden: Tensor) -> Tensor:
    """How much each hidden state `[batch, length]` counts; the weights sum to the first number of [`count`]."""
    mask = _token_mask(inputs)
    if mask is None:
        main = inputs[model.main_input_name]
        weights = torch.ones(hidden.shape[:2], device=hidden.device)
        if (attention := inputs.get("attention_mask")) is not None and attention.dim() == 2:
            # audio: hidden states are fewer than samples, and the model knows which of them are padding
            weights = model._get_feature_vector_attention_mask(hidden.shape[1], attention).float()
        return weights * (_num_units(inputs, main) / len(main) / weights.sum(1, keepdim=True))
    if mask.shape != hidden.shape[:2]:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)} but the hidden states {tuple(hidden.shape[:2])}; they must "
            "have one entry a token. Check the collator."
        )
    return mask


def label_weights(model: nn.Module, inputs: Mapping[str, Any], hidden: Tensor) -> Tensor:
    """1 for each hidden state `[batch, length]` that answers a label, else 0; they sum to the second of [`count`].

    Raises:
        ValueError: the batch has no label for each token.
    """
    labels = _aligned_labels(model, inputs)
    if labels is None or labels.shape != hidden.shape[:2]:
        raise ValueError(
            "hidden_positions='labels' matches hidden states where a token's label counts, but the batch has "
            f"{'no labels' if labels is None else f'labels of shape {tuple(labels.shape)}'} for hidden states of shape "
            f"{tuple(hidden.shape[:2])}; use hidden_positions='tokens'."
        )
    return labels.ne(-100)


def _token_mask(inputs: Mapping[str, Any]) -> Tensor | None:
    mask = inputs.get("attention_mask")
    return mask.bool() if mask is not None and mask.dim() == 2 and "input_ids" in inputs else None


def _num_units(inputs: Mapping[str, Any], main: Tensor) -> int:
    return main.numel() if "input_ids" in inputs else len(main)


def _aligned_labels(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | None:
    """Labels in the place of the logits that predict them."""
    labels = inputs.get("labels")
    if labels is None:
        return None
    if labels.is_floating_point() or labels.dim() > 2:
        raise ValueError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}; class numbers of shape [batch] or [batch, "
            "length] are needed to match the teacher's class probabilities."
        )
    if labels.dim() == 2 and predicts_next_token(model):
        return F.pad(labels[:, 1:], (0, 1), value=-100)
    return labels
