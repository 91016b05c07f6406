"""What a command says of an error: one line of printable characters, whatever names of files contain."""

from __future__ import annotations

import logging
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

logger = logging.getLogger(f"transformers.{__name__}")


def printable(value: Any) -> str:
    r"""Text as one line for a terminal, with an escape for each character that is not printable.

    >>> print(printable("a\n\x1b[2J"))
    a\n\x1b[2J
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))


def one_line(message: Any) -> str:
    """A message of several lines as a single one."""
    return printable(" ".join(str(message).split()))


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """End a command with one line, without a traceback, for an error in what the user gave.

    Such errors are a `ValueError` or, for files, an `OSError`. The traceback is logged at the level `debug`, which
    `TRANSFORMERS_VERBOSITY=debug` shows.

    Raises:
        SystemExit: in place of such an error.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        logger.debug("The traceback of this error:", exc_info=True)
        raise SystemExit(one_line(error)) from error


class CommandParser(ArgumentParser):
    """Ends a command that is wrong with its usage and one line."""

    def error(self, message: str) -> NoReturn:
        super().error(one_line(message))
