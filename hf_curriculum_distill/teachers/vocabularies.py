"""Vocabularies of two sizes whose entries mean the same tokens, as far as a tokenizer has any."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_curriculum_distill.layers.heads import num_classes
from hf_curriculum_distill.teachers.teacher import Teacher


def shared_vocabulary(student: PreTrainedModel, teacher: PreTrainedModel, processing_class: Any = None) -> int | None:
    """The number of tokens of a tokenizer whose ids both models know although their vocabularies differ in size.

    Vocabularies are padded, for instance to a multiple of 64, and the entries after the tokenizer's mean nothing.

    Args:
        processing_class: the student's tokenizer or processor.

    Returns:
        one more than the largest id; None if the vocabularies are of one size, if there is no tokenizer, or if it has
        ids that one of the models does not know.
    """
    sizes, tokenizer = vocabulary_sizes(student, teacher), getattr(processing_class, "tokenizer", processing_class)
    if len(sizes) < 2 or not isinstance(tokenizer, PreTrainedTokenizerBase):
        return None
    number = max(tokenizer.get_vocab().values(), default=-1) + 1
    return number if 0 < number <= min(sizes) else None


def share_vocabulary(student: PreTrainedModel, teacher: Teacher, processing_class: Any = None) -> int | None:
    """Cut the teacher's logits to the tokens that both models know, if their vocabularies differ in size.

    Returns:
        their number: see [`shared_vocabulary`].
    """
    number = shared_vocabulary(student, teacher.model, processing_class)
    if num_classes(student) in vocabulary_sizes(student, teacher.model):  # not of a classifier
        teacher.partial_forward.num_classes = number
    return number


def vocabulary_sizes(*models: PreTrainedModel) -> list[int]:
    """The sizes of two models' vocabularies; one if they are equal, none if a model has no vocabulary."""
    sizes = [getattr(model.config.get_text_config(), "vocab_size", None) for model in models]
    return [] if None in sizes else list(dict.fromkeys(sizes))
