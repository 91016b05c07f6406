"""The command line of the recipes: a YAML file gives defaults, the command line wins, unknown keys are errors."""

from __future__ import annotations

import difflib
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any

import yaml
from transformers import HfArgumentParser


def parse_arguments(dataclass_types: Sequence[type], argv: Sequence[str] | None = None, description: str = "") -> tuple:
    """Parse `[--config FILE.yaml] [--any_field value]` into dataclasses.

    A wrong key or value ends the program with exit status 2 and a line that says what to do, as argparse does.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    usage = "%(prog)s [--help] [--config FILE.yaml] [--option value ...]"
    parser = HfArgumentParser(dataclass_types, description=description, usage=usage, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file of defaults for the options below.")
    config_parser = ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    path = config_parser.parse_known_args(argv)[0].config
    try:
        if path is not None:
            defaults = _read_yaml(path)
            for key in defaults:
                _check_option(str(key), parser, f"{path} sets")
            for action in parser._actions:
                action.required = action.required and action.dest not in defaults
            parser.set_defaults(**defaults)
        *parsed, _, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
        for key in unknown[:1]:
            _check_option(key.lstrip("-"), parser, "the command line sets")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return tuple(parsed)


def _read_yaml(path: str) -> dict[str, Any]:
    with open(path, encoding="utf-8") as file:
        try:
            values = yaml.safe_load(file)
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; write `option: value` lines.")
    return values


def _check_option(key: str, parser: ArgumentParser, where: str) -> None:
    known = {action.dest for action in parser._actions} - {"help", "config"}
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        raise ValueError(
            f"{where} {key!r}, which is no option; " + (f"did you mean {near[0]}?" if near else "see --help.")
        )
