"""What counts in a batch: positions for hidden states, rows for logits.

Losses are sums over what counts, divided by how much counted over the whole accumulated batch; these are the two
sides of that fraction.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_curriculum_distill.adapted import transformers_model

LABEL_POSITIONS = "label_positions"
_ONE_ANSWER_PER_EXAMPLE = ("SequenceClassification", "ImageClassification", "AudioClassification")


def predicts_next_token(model: nn.Module) -> bool:
    """Whether logits at position `i` belong to the label at `i + 1` (causal language models shift inside the loss)."""
    model = transformers_model(model)
    if getattr(model.config, "is_encoder_decoder", False):
        return False
    return _is_causal(type(model)) or getattr(model, "loss_type", None) == "ForCausalLM"


@functools.cache
def _is_causal(model_class: type) -> bool:
    # by any base: FSDP2 makes a class of its own of the one that it shards
    return any(base.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for base in model_class.__mro__)


def answers_per_token(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether the model's logits have one row a token, `[batch, length, classes]`, not one an example."""
    if (labels := inputs.get("labels")) is not None:
        return labels.dim() > 1
    return not any(task in type(transformers_model(model)).__name__ for task in _ONE_ANSWER_PER_EXAMPLE)


def answers_per_example(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """How many rows of logits an example has: one, or one a token (of the labels, where there are any)."""
    if not answers_per_token(model, inputs):
        return 1
    return inputs.get("labels", inputs[model.main_input_name]).shape[1]


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
        positions = None if predicts_next_token(model) else inputs.get(LABEL_POSITIONS)
        if positions is None:
            rows = labels.flatten().ne(-100).nonzero().squeeze(1)  # waits for the device, which alone knows how many
        else:
            starts = torch.arange(len(labels), device=labels.device) * labels.shape[1]
            rows = (positions + starts[:, None]).flatten()
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


def with_label_positions(
    collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]], examples: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """A collator's batch and, if it made equally many labels for each example, where they are.

    These `label_positions`, `[batch, labels an example]`, are read off the finished labels where these still lie in
    host memory. They are no input of a model: [`counted_rows`] takes them in place of a wait for the device.
    """
    batch = collate(examples)
    labels = batch.get("labels")
    if labels is None or labels.dim() != 2 or "labels" in examples[0]:  # labels that were there promise nothing
        return batch
    counted = labels.ne(-100)
    counts = counted.sum(1).tolist()
    if min(counts) < max(counts):
        return batch
    return {**batch, LABEL_POSITIONS: counted.nonzero()[:, 1].view(len(labels), counts[0])}


def count(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """`[number of positions, number of rows]` that count in a batch, without waiting for the device.

    Text: positions are the tokens that are not padding. Images and audio: one an example, shared equally by its
    hidden states (see [`position_weights`]).
    """
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
