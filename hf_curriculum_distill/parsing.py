"""Options from dataclasses, a YAML file and the command line, for the recipes and `hf-curriculum-distill plan`.

A YAML file gives defaults, the command line wins, unknown keys are errors.
"""

from __future__ import annotations

import difflib
import re
import reprlib
import sys
from argparse import Action, ArgumentParser
from collections.abc import Collection, Mapping, Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments

from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.lines import CommandParser


class _OptionParser(CommandParser, HfArgumentParser):
    """Its help starts with the program's own options and ends with those of `TrainingArguments`."""

    def format_help(self) -> str:
        owners = {name: base for kind in self.dataclass_types for base in kind.__mro__ for name in _fields(base)}
        groups: dict[str, list[Action]] = {"options": [], "distillation": [], "training, as for any Trainer": []}
        for action in self._actions:
            owner = owners.get(action.dest)
            place = [owner is not None and issubclass(kind, owner) for kind in _GROUPED].count(True)
            list(groups.values())[place].append(action)
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, [])
        formatter.add_text(self.description)
        for title, actions in groups.items():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        return formatter.format_help()


# an option that both of these have is one of `Trainer`, one that the first alone has is the library's
_GROUPED = CurriculumDistillationConfig, TrainingArguments


def _fields(kind: type) -> dict[str, Any]:
    """The fields of a dataclass, its bases' included; of any other class none."""
    return getattr(kind, "__dataclass_fields__", {})


def parse_arguments(
    dataclass_types: Sequence[type],
    argv: Sequence[str] | None = None,
    description: str = "",
    prog: str | None = None,
    defaults: Mapping[str, Any] | None = None,
    unread: Collection[str] = (),
) -> tuple:
    """Parse `[--config FILE.yaml] [--any_field value]` into dataclasses.

    A wrong key or value ends the program with exit status 2 and a line that says what to do, as argparse does.

    Args:
        dataclass_types: their fields are the options. A field that a subclass declares again, for another default,
            keeps its help.
        argv: the command line without the program's name; by default that of this process.
        description: what the program does.
        prog: the program's name; by default that of this process.
        defaults: of options, in place of those of `dataclass_types`; the file's come before them.
        unread: keys of the file that are no options, and no errors.

    Returns:
        An instance of each of `dataclass_types`.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    usage = "%(prog)s [--help] [--config FILE.yaml] [--option value ...]"
    parser = _OptionParser(dataclass_types, prog=prog, description=description, usage=usage, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file of defaults for the options below.")
    helps = {
        field.name: field.metadata["help"]
        for kind in dataclass_types
        for base in reversed(kind.__mro__)
        for field in _fields(base).values()
        if "help" in field.metadata
    }
    for action in parser._actions:
        help = action.help or helps.get(action.dest)
        # argparse formats a help; those of transformers have %% already
        action.help = help and re.sub(r"(?<!%)%(?![%(])", "%%", help)
    config_parser = ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    path = config_parser.parse_known_args(argv)[0].config
    try:
        defaults = dict(defaults or {})
        if path is not None:
            # `recipe` is for the command `hf-curriculum-distill`
            given = {key: value for key, value in read_yaml(path).items() if key not in ("recipe", *unread)}
            hints = {name: hint for kind in dataclass_types for name, hint in get_type_hints(kind).items()}
            for key, value in given.items():
                _check_option(str(key), parser, f"{path} sets")
                _check_type(key, value, hints[key], path)
            defaults |= given
        for action in parser._actions:
            action.required = action.required and action.dest not in defaults
        parser.set_defaults(**defaults)
        *parsed, _, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
        for key in unknown[:1]:
            _check_option(key.lstrip("-"), parser, "the command line sets")
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    except (TypeError, AttributeError, LookupError, RecursionError) as error:  # TrainingArguments checks little itself
        parser.error(f"The options make no configuration ({type(error).__name__}: {error}); see --help.")
    return tuple(parsed)


def read_yaml(path: str) -> dict[str, Any]:
    """Read a file of `option: value` lines.

    Raises:
        OSError: there is no such file.
        ValueError: it holds something else.
    """
    with open(path, encoding="utf-8") as file:
        try:
            values = yaml.safe_load(file)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; write `option: value` lines.")
    return values


def _check_option(key: str, parser: ArgumentParser, where: str) -> None:
    if key not in (known := _options(parser)):
        near = difflib.get_close_matches(key, known, 1)
        raise ValueError(
            f"{where} {key!r}, which is no option; " + (f"did you mean {near[0]}?" if near else "see --help.")
        )


def _options(parser: ArgumentParser) -> set[str]:
    return {action.dest for action in parser._actions} - {"help", "config"}


def _check_type(key: str, value: Any, hint: Any, path: str) -> None:
    # argparse converts text to an option's type, but takes any other default as it is
    if not (_fits(value, hint) or (isinstance(value, str) and get_origin(hint) is not list)):
        wanted = hint.__name__ if isinstance(hint, type) and not get_args(hint) else hint
        raise ValueError(f"{path} sets {key} to {reprlib.repr(value)}, but it must be of type {wanted}; see --help.")


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, kind) for kind in get_args(hint))
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(element, get_args(hint)[0]) for element in value)
    if isinstance(value, bool) and hint in (int, float):
        return False
    return hint is Any or isinstance(value, (int, float) if hint is float else get_origin(hint) or hint)
