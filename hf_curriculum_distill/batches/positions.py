"""What counts in a batch: positions of hidden states, and rows of logits.

A loss is a sum over the positions or rows that count, divided by their number in the whole accumulated batch. This
module has both: which ones count, and how many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_curriculum_distill.layers.adapted import transformers_model
from hf_curriculum_distill.layers.heads import (
    ONE_ROW_PER_EXAMPLE,
    decodes_labels,
    head_of,
    is_ctc,
    predicts_next_token,
)

LABEL_POSITIONS = "label_positions"


def has_rows_per_token(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether logits have one row for each token or frame, `[batch, length, classes]`, not one for each example.

    Args:
        inputs: a batch, with labels if it has any: `[batch, length]`, or `[batch]` for one row per example.
    """
    if is_ctc(model):
        return True
    if head_of(model).rows_per_example is not None:
        return False
    if (labels := inputs.get("labels")) is not None:
        return labels.dim() > 1
    return not any(task in type(transformers_model(model)).__name__ for task in ONE_ROW_PER_EXAMPLE)


def num_rows_per_example(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """The number of rows of logits of an example, padding included.

    It is what the task says, or the number of frames, or that of tokens (of the labels, if there are any).

    Args:
        inputs: a batch, with its labels if it has any.
    """
    if not has_rows_per_token(model, inputs):
        return head_of(model).rows_per_example or 1
    if is_ctc(model):
        return _num_frames(model, inputs)
    return inputs.get("labels", inputs[model.main_input_name]).shape[1]


def counted_rows(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """Which rows of the flattened logits count, and their labels.

    With labels (see [`Head.labels`]), those whose label is not -100; without labels, and for CTC, all that are not
    padding.

    Args:
        inputs: a batch, with its labels and their positions if it has any.

    Returns:
        row numbers `[rows]` into `logits.flatten(0, -2)`, None for all rows; and their labels `[rows]`, None without
        labels.

    Raises:
        ValueError: labels are not class numbers, or are missing although the rows depend on them.
    """
    if is_ctc(model):
        attention = inputs.get("attention_mask")
        if attention is None:
            return None, None
        return _frame_mask(model, attention, _num_frames(model, inputs)).flatten().nonzero().squeeze(1), None
    labels = _aligned_labels(model, inputs)
    if labels is not None and head_of(model).predicts_numbers:
        return None, labels.flatten()
    if labels is not None:
        positions = None if predicts_next_token(model) else inputs.get(LABEL_POSITIONS)
        if positions is None:
            rows = labels.flatten().ne(-100).nonzero().squeeze(1)  # waits for the device
        else:
            starts = torch.arange(len(labels), device=labels.device) * labels.shape[1]
            rows = (positions + starts[:, None]).flatten()
        return rows, labels.flatten()[rows]
    if decodes_labels(model):
        raise ValueError(
            f"The batch has no labels, but the logits of {type(model).__name__} predict its decoder's tokens, which "
            "are made from labels; check the collator."
        )
    mask = _token_mask(inputs)
    if mask is None or not has_rows_per_token(model, inputs):
        if "input_ids" not in inputs and has_rows_per_token(model, inputs):
            raise ValueError(
                f"The batch has no labels, which say how many rows of logits {type(model).__name__} has for an "
                "example; check the collator, or match hidden states only, with method='hidden'."
            )
        return None, None
    return mask.flatten().nonzero().squeeze(1), None


def num_masked_patches(model: nn.Module) -> int:
    """The number of patches of an image of which a masked autoencoder reads some at random; 0 for other models."""
    if not getattr(model.config, "mask_ratio", 0):
        return 0
    return next((module.num_patches for module in model.base_model.modules() if hasattr(module, "num_patches")), 0)


def shifted_right(model: nn.Module, labels: Tensor) -> Tensor:
    """The decoder's inputs that an encoder-decoder makes from labels: each token's predecessor, `[batch, length]`.

    Args:
        labels: `[batch, length]`, -100 where none counts.

    Raises:
        ValueError: the configuration has no start token or no padding token.
    """
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels)
    start, padding = (getattr(model.config, f"{name}_token_id", None) for name in ("decoder_start", "pad"))
    if start is None or padding is None:
        raise ValueError(
            f"The batch has labels but no decoder_input_ids, and the configuration of {type(model).__name__} has "
            f"decoder_start_token_id={start} and pad_token_id={padding}, so that the decoder's inputs can't be made of "
            "the labels; set both, or give decoder_input_ids."
        )
    shifted = F.pad(labels[:, :-1], (1, 0), value=start)
    return shifted.masked_fill(shifted == -100, padding)


def with_label_positions(
    collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]], examples: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Collate examples and, if each example got the same number of labels, add the labels' positions.

    These `label_positions`, `[batch, labels per example]`, are computed from the labels while they are in host memory.
    They are not an input of any model: with them, [`counted_rows`] need not wait for the device.

    Args:
        collate: makes a batch of examples, with labels or not.
    """
    batch = collate(examples)
    labels = batch.get("labels")
    # precomputed labels need not be equally many in the next batch
    if labels is None or labels.dim() != 2 or "labels" in examples[0]:
        return batch
    counted = labels.ne(-100)
    counts = counted.sum(1).tolist()
    if min(counts) < max(counts):
        return batch
    return {**batch, LABEL_POSITIONS: counted.nonzero()[:, 1].view(len(labels), counts[0])}


def count(model: nn.Module, inputs: Mapping[str, Any], stack: str = "encoder") -> Tensor:
    """The number of positions and of rows that count in a batch, computed without waiting for the device.

    In text, the positions are the tokens that are not padding. An image or a recording counts as one position, which
    its hidden states share equally (see [`position_weights`]).

    Args:
        stack: the stack of an encoder-decoder whose hidden states are matched.

    Returns:
        `[2]`, integers on the device of the inputs.
    """
    labels, mask = _aligned_labels(model, inputs), _token_mask(inputs, stack)
    main = inputs[model.main_input_name]
    positions = mask.sum() if mask is not None else torch.full((), _num_units(inputs, main, stack), device=main.device)
    if is_ctc(model) and hasattr(model, "_get_feat_extract_output_lengths"):
        num_frames = _num_frames(model, inputs)
        if (attention := inputs.get("attention_mask")) is not None:
            rows = _frame_mask(model, attention, num_frames).sum()
        else:
            rows = torch.full((), len(main) * num_frames, device=main.device)
    elif labels is not None and not head_of(model).predicts_numbers:
        rows = labels.ne(-100).sum()
    elif has_rows_per_token(model, inputs):
        rows = positions
    else:
        rows = torch.full((), len(main) * num_rows_per_example(model, inputs), device=main.device)
    return torch.stack([positions, rows])


def position_weights(model: nn.Module, inputs: Mapping[str, Any], hidden: Tensor, stack: str = "encoder") -> Tensor:
    """The weight of each hidden state, `[batch, length]`; the weights add up to the first number of [`count`].

    Args:
        hidden: `[batch, length, hidden]`, of which only the shape is read.
        stack: the stack of an encoder-decoder whose hidden states they are.

    Raises:
        ValueError: the mask does not fit the hidden states.
    """
    mask = _token_mask(inputs, stack)
    if mask is None:
        main, attention = inputs[model.main_input_name], inputs.get("attention_mask")
        per_example = _num_units(inputs, main, stack) / len(hidden)
        if stack == "encoder" and attention is not None and attention.dim() == 2 and "input_ids" not in inputs:
            weights = _frame_mask(model, attention, hidden.shape[1]).float()
            return weights * (per_example / weights.sum(1, keepdim=True))
        return torch.full(hidden.shape[:2], per_example / hidden.shape[1], device=hidden.device)
    if mask.shape != hidden.shape[:2]:
        name = "attention_mask" if stack == "encoder" else "The decoder's mask, or its labels,"
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)} but the hidden states {tuple(hidden.shape[:2])}; they must "
            "have one entry a token. Check the collator."
        )
    return mask


def label_weights(model: nn.Module, inputs: Mapping[str, Any], hidden: Tensor) -> Tensor:
    """Which hidden states predict a label that counts, `[batch, length]`; as many as the second number of [`count`].

    Args:
        hidden: `[batch, length, hidden]`, of which only the shape is read.

    Raises:
        ValueError: the batch has no label for each token.
    """
    labels = _aligned_labels(model, inputs)
    if labels is None or labels.shape != hidden.shape[:2] or head_of(model).rows_per_example is not None:
        raise ValueError(
            "hidden_positions='labels' matches hidden states where a token's label counts, but the batch has "
            f"{'no labels' if labels is None else f'labels of shape {tuple(labels.shape)}'} for hidden states of shape "
            f"{tuple(hidden.shape[:2])}; use hidden_positions='tokens'."
        )
    return labels.ne(-100)


def _token_mask(inputs: Mapping[str, Any], stack: str = "encoder") -> Tensor | None:
    if stack == "decoder":
        if (mask := inputs.get("decoder_attention_mask")) is not None:
            return mask.bool()
        return None if (labels := inputs.get("labels")) is None or labels.dim() != 2 else labels.ne(-100)
    mask = inputs.get("attention_mask")
    if mask is None or "input_ids" not in inputs:
        return None
    if mask.dim() == 3 and mask.shape == inputs["input_ids"].shape:  # of each choice, which the model reads as examples
        mask = mask.flatten(0, 1)
    return mask.bool() if mask.dim() == 2 else None


def _num_units(inputs: Mapping[str, Any], main: Tensor, stack: str) -> int:
    if stack == "decoder" and "decoder_input_ids" in inputs:
        return inputs["decoder_input_ids"].numel()
    return main.numel() if "input_ids" in inputs else len(main)


def _num_frames(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """The number of frames of an example, and so of its rows of logits, padding included."""
    return int(model._get_feat_extract_output_lengths(torch.tensor(inputs[model.main_input_name].shape[1])))


def _frame_mask(model: nn.Module, attention_mask: Tensor, num_frames: int) -> Tensor:
    """Which of an audio model's hidden states are not padding, `[batch, num_frames]`.

    There are fewer frames than samples; the model's own methods say how many frames a recording fills.
    """
    if hasattr(model, "_get_feature_vector_attention_mask"):
        return model._get_feature_vector_attention_mask(num_frames, attention_mask).bool()
    if hasattr(model, "_get_feat_extract_output_lengths"):
        # one recording at a time, because some models compute this with Python integers
        lengths = [int(model._get_feat_extract_output_lengths(n)) for n in attention_mask.sum(1).tolist()]
        if min(lengths) < 1:
            raise ValueError(
                f"{type(model).__name__} says that no hidden state of {num_frames} belongs to one of the batch's "
                "examples, by its attention_mask; leave attention_mask out of the batch."
            )
        frames = torch.arange(num_frames, device=attention_mask.device)
        return frames < torch.tensor(lengths, device=attention_mask.device)[:, None]
    raise ValueError(
        f"The batch has an attention_mask, but {type(model).__name__} doesn't say which of its {num_frames} hidden "
        "states are padding; leave attention_mask out of the batch."
    )


def _aligned_labels(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | None:
    """Labels at the positions of the logits that predict them, one earlier for causal models; None without labels."""
    head = head_of(model)
    if is_ctc(model):  # a transcript has no frames
        return None
    if head.rows_per_example is not None:
        return head.labels(inputs)
    if (labels := inputs.get("labels")) is None:
        return None
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"labels are a {type(labels).__name__}; class numbers of shape [batch] or [batch, length] are needed to "
            "match the teacher's class probabilities."
        )
    if labels.is_floating_point() or labels.dim() > 2:
        raise ValueError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}; class numbers of shape [batch] or [batch, "
            "length] are needed to match the teacher's class probabilities."
        )
    if labels.dim() == 2 and predicts_next_token(model):
        return F.pad(labels[:, 1:], (0, 1), value=-100)
    return labels
