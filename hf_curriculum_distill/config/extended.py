"""Training arguments of any class, with the fields of [`CurriculumDistillationConfig`] beside their own."""

from __future__ import annotations

import dataclasses
import functools

from transformers import TrainingArguments

from hf_curriculum_distill.config.distillation import CurriculumDistillationConfig


def extended(args: TrainingArguments) -> CurriculumDistillationConfig:
    """Give training arguments the fields of this library, with their defaults.

    The object stays the one that it is, so that a script and the trainer go on reading and setting the same one. Its
    class becomes one that inherits from its own and from [`CurriculumDistillationConfig`].

    Args:
        args: of [`~transformers.TrainingArguments`] or a subclass. A field of the subclass that has the name of one of
            this library's is taken for that one, with its value.

    Returns:
        `args`.

    Raises:
        ValueError: such a field has a value that this library does not know.
    """
    if isinstance(args, CurriculumDistillationConfig):
        return args
    for field in dataclasses.fields(CurriculumDistillationConfig):
        if not hasattr(args, field.name):
            setattr(args, field.name, field.default)
    args.logging_nan_inf_filter = False
    args.__class__ = _extended_class(type(args))
    args.prepare()
    return args


@functools.cache
def _extended_class(own: type[TrainingArguments]) -> type[CurriculumDistillationConfig]:
    if own is TrainingArguments:
        return CurriculumDistillationConfig
    namespace = {
        "__module__": own.__module__,
        "__doc__": own.__doc__,
        # Trainer pickles its arguments, and this class cannot be imported by its name
        "__reduce__": lambda self: (_without_values, (own,), self.__dict__),
    }
    bases = (CurriculumDistillationConfig, own)
    return dataclasses.make_dataclass(own.__name__, [], bases=bases, namespace=namespace, repr=False)


def _without_values(own: type[TrainingArguments]) -> CurriculumDistillationConfig:
    made = _extended_class(own)
    return made.__new__(made)
