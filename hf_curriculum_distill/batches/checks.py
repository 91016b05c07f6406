"""Whether a batch can be used: its shapes and values, and what its labels mean to the model."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_curriculum_distill.batches.batch import Batch
from hf_curriculum_distill.layers.adapted import transformers_model
from hf_curriculum_distill.layers.heads import (
    CHOICE,
    CLASSES,
    ONE_ROW_PER_EXAMPLE,
    auxiliary_loss,
    head_of,
    is_ctc,
    makes_decoder_inputs_itself,
    num_classes,
    predicts_next_token,
)

_ONE_ROW_PER_TOKEN = ("ForMaskedLM", "ForTokenClassification")


@contextmanager
def naming_batch(where: str) -> Iterator[None]:
    """Turn errors into a `ValueError` that names the batch; data sets and collators raise errors of all kinds.

    Args:
        where: the batch, as the message names it.
    """
    try:
        yield
    except (ValueError, TypeError, LookupError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f"The batch of {where} cannot be used: {error}") from error


def check_batch(model: nn.Module, inputs: Mapping[str, Any], reads_labels: bool = True) -> None:
    """Check that a batch means what the losses take it to mean.

    Shapes are always checked, values only if they are in host memory: nothing waits for the device.

    Args:
        inputs: the batch.
        reads_labels: whether a loss needs its labels.

    Raises:
        ValueError: an input is missing or empty, or tokens, attention mask and labels do not fit each other or the
            model.
    """
    model = transformers_model(model)
    name, classes = model.main_input_name, num_classes(model)
    main = inputs.get(name) if isinstance(inputs, Mapping) else None
    if not isinstance(main, Tensor) or not main.numel():
        held = ", ".join(inputs) if isinstance(inputs, Mapping) else f"a {type(inputs).__name__}"
        raise ValueError(
            f"The batch has no {name}, or none but empty ones; it holds {held or 'nothing'}. {type(model).__name__} "
            "needs them. Check the data set's columns and the collator."
        )
    head, mask, labels = head_of(model), inputs.get("attention_mask"), inputs.get("labels")
    if labels is not None and inputs.get("decoder_input_ids") is None and makes_decoder_inputs_itself(model):
        raise ValueError(
            f"The batch has labels but no decoder_input_ids; {type(model).__name__} would make them of the labels, but "
            "runs without labels, because its own loss is not what is trained. Give decoder_input_ids as well."
        )
    if name == "input_ids":
        axes = ("batch", "choices", "length") if head is CHOICE else ("batch", "length")
        if main.is_floating_point() or main.dim() != len(axes):
            raise ValueError(f"input_ids are {_describe(main)}; token numbers of shape [{', '.join(axes)}] are needed.")
        _check_values(main, "input_ids", getattr(model.config.get_text_config(), "vocab_size", None))
        if mask is not None and (mask.dim() < 2 or (mask.dim() == len(axes) and mask.shape != main.shape)):
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)} but input_ids {tuple(main.shape)}; they must have one "
                "entry a token. Check the collator."
            )
    elif main.device.type == "cpu" and not main.isfinite().all():
        raise ValueError(f"{name} have values that are nan or inf; check the data and its preprocessing.")
    if reads_labels and head is not CLASSES:
        _check_labels_of_examples(model, inputs, main)
    elif reads_labels and labels is not None and not is_ctc(model):
        _check_class_numbers(model, labels, main, classes)


def _check_class_numbers(model: nn.Module, labels: Any, main: Tensor, classes: int | None) -> None:
    """Check the labels of a model that has one row for each token, or one for each example."""
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"labels are a {type(labels).__name__}; class numbers of shape [batch] or [batch, length] are needed to "
            "match the teacher's class probabilities. Match hidden states only, with method='hidden'."
        )
    instead = (
        " For numbers or several classes an example set problem_type='regression' or 'multi_label_classification'."
    )
    if labels.is_floating_point() or labels.dim() not in (1, 2):
        raise ValueError(
            f"labels are {_describe(labels)}; class numbers of shape [batch] or [batch, length] are needed to match "
            "the teacher's class probabilities."
            f"{instead if _is_for(type(model), ONE_ROW_PER_EXAMPLE) else ''}"
        )
    per_token = predicts_next_token(model) or _is_for(type(model), _ONE_ROW_PER_TOKEN)
    wanted = main.shape if per_token else main.shape[: 1 if _is_for(type(model), ONE_ROW_PER_EXAMPLE) else 0]
    if len(labels) != len(main) or (wanted and labels.shape != wanted):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} but {model.main_input_name} {tuple(main.shape)}; "
            f"{type(model).__name__} needs one label {'a token' if per_token else 'an example'}. Check the collator."
        )
    _check_values(labels.where(labels != -100, 0), "labels", classes, " (-100: does not count)")


def _check_labels_of_examples(model: nn.Module, inputs: Mapping[str, Any], main: Tensor) -> None:
    """Check the labels of a model that has as many rows for each example."""
    head, size = head_of(model), len(main)
    given = [name for name in head.label_names if inputs.get(name) is not None]
    if not given:
        return
    number = head.rows_per_example // len(head.label_names)
    kind = "floats" if head.has_float_labels else "whole numbers"
    for name in head.label_names:
        labels = inputs.get(name)
        fits = isinstance(labels, Tensor) and labels.is_floating_point() == head.has_float_labels
        if not fits or labels.shape not in ((size, number), *([(size,)] if number == 1 else [])):
            held = _describe(labels) if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
            raise ValueError(
                f"{name} are {held}; {type(model).__name__} needs {kind} of shape [{size}"
                f"{f', {number}' if number > 1 else ''}], with which each row is {head.name}. Check the collator."
            )
    labels = inputs[head.label_names[0]]
    if labels.device.type != "cpu":
        return
    if head.has_float_labels and not labels.isfinite().all():
        raise ValueError("labels are nan or inf for some example; check the data.")
    if head.num_classes == 2 and not ((labels == 0) | (labels == 1)).all():
        raise ValueError("labels are other numbers than 0 and 1, which say for each class whether an example has it.")
    if head is CHOICE:
        _check_values(labels.where(labels != -100, 0), "labels", main.shape[1], " (-100: does not count)")


def label_loss_mismatch(batch: Batch, outputs: Mapping[str, Any] | Sequence[Any], tolerance: float) -> str | None:
    """Compare a model's own loss on a batch with the loss of the rows that count.

    They differ if labels belong to other rows of the logits than [`counted_rows`] assumes, or are not classes.

    Args:
        outputs: the model's outputs in evaluation mode.
        tolerance: the relative difference that the precision of the losses allows.

    Returns:
        a sentence that says how they differ; None if they do not, or cannot be compared.
    """
    head, name = batch.head, type(batch.model).__name__
    if not isinstance(outputs, Mapping):
        outputs = dict(zip(("loss", *head.output_names), outputs, strict=False))
    loss, logits = outputs.get("loss"), head.logits(outputs) if head.is_in(outputs) else None
    if not isinstance(logits, Tensor):
        return None if logits is None else f"The logits of {name} are a {type(logits).__name__}, not a tensor."
    try:
        rows, labels, wanted = batch.rows, batch.labels, len(batch) * batch.rows_per_example
    except ValueError as error:
        return str(error)
    if logits.shape[:-1].numel() != wanted:
        return f"The logits of {name} have shape {tuple(logits.shape)}, but the batch's labels belong to {wanted} rows."
    if labels is None or loss is None or not len(labels):
        return None
    rows = slice(None) if rows is None else rows
    ours = head.label_loss(logits.flatten(0, -2)[rows], labels).item() / len(labels)
    own = loss.item() - float(auxiliary_loss(batch.model, outputs))
    if not math.isfinite(ours) or math.isclose(ours, own, rel_tol=tolerance, abs_tol=tolerance):
        return None
    loss_name = "squared error" if head.predicts_numbers else "cross-entropy"
    return (
        f"The loss of {name} on a batch is {own:.6g}, but the {loss_name} of its logits with the labels that count "
        f"is {ours:.6g}, so its labels mean something else than the classes of these rows."
    )


def _check_values(numbers: Tensor, name: str, end: int | None, beside: str = "") -> None:
    if end is None or numbers.device.type != "cpu":
        return
    low, high = (value.item() for value in numbers.aminmax())
    if low < 0 or high >= end:
        raise ValueError(
            f"{name} hold {low if low < 0 else high}, but the model knows 0 to {end - 1}{beside}. Check that data, "
            "tokenizer and model belong together."
        )


@functools.cache
def _is_for(model_class: type, tasks: tuple[str, ...]) -> bool:
    return any(task in base.__name__ for base in model_class.__mro__ for task in tasks)


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"
