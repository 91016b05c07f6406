"""Loggers whose messages are seen where those of `transformers` are."""

from __future__ import annotations

from logging import Logger

from transformers.utils import logging


def get_logger(name: str) -> Logger:
    """A logger below that of `transformers`.

    So it has its handler and its verbosity: that of `transformers.logging.set_verbosity_info()`, and `log_level` of the
    training arguments.

    Args:
        name: of the module.
    """
    return logging.get_logger(f"transformers.{name}")
