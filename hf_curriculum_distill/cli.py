"""Command lines: `hf-curriculum-distill plan | compare`, and the options of the recipes.

In a recipe a YAML file gives defaults, the command line wins, unknown keys are errors.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import reprlib
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from importlib.util import find_spec
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from hf_curriculum_distill.files import write_files
from hf_curriculum_distill.planning import RECIPE_OPTIONS, PlanArguments, PlannedConfig, format_plan, make_plan
from hf_curriculum_distill.report.results import is_checkpoint, printable, read_results
from hf_curriculum_distill.report.tables import PLOT_FILE, format_summary, plot_comparison


def main(argv: Sequence[str] | None = None) -> None:
    """Run `hf-curriculum-distill COMMAND ...`; an error ends it with exit status 2 and a line that says what is wrong.

    Args:
        argv: the command line without the program's name; by default that of this process.
    """
    parser = _Parser("hf-curriculum-distill", description="Tools around distillation runs.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    about = "Check a run before it starts; print its stages, operations, time and memory."
    plan = commands.add_parser("plan", help=about, add_help=False)  # its options are a recipe's: see `_plan`
    plan.set_defaults(command=_plan)

    about = "Compare finished runs: a table with one line a method, and a plot."
    compare = commands.add_parser("compare", help=about, description=about, allow_abbrev=False)
    compare.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="A recipe's output folder, or the folder or a checkpoint of one run. Runs of one method that differ in "
        "their seed alone share a line; others are named by the setting or folder that tells them apart. What is in a "
        "data set is not recorded.",
    )
    compare.add_argument("--metric", default="eval_accuracy", help="What is compared (default: %(default)s).")
    compare.add_argument(
        "--threshold",
        type=float,
        help="Its value to reach (default: the worst at which a run of the baseline ended; a share of 0 takes no "
        "learning and is no value to reach).",
    )
    compare.add_argument("--baseline", help="The method that the ratios compare with (default: one_shot, if there).")
    compare.add_argument(
        "--output",
        metavar="FOLDER",
        help="Where the plot is written (default: the first RUN, or the run whose checkpoint that is).",
    )
    compare.set_defaults(command=_compare)

    args, args.options = parser.parse_known_args(argv)
    if args.options and args.command is not _plan:
        parser.error(f"unrecognized arguments: {' '.join(args.options)}")
    try:
        args.command(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except RecursionError:
        parser.error("What a file holds is nested too deeply to be read.")


class _Parser(ArgumentParser):
    """Prints an error as one line of printable characters, whatever the names of files and folders contain."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(" ".join(message.split())))


class _OptionParser(_Parser, HfArgumentParser):
    pass


def _plan(args: Namespace) -> None:
    about = "Check a run before it starts; print its stages, operations, time and memory."
    unread: list[str] = []
    options, config = parse_arguments(
        [PlanArguments, PlannedConfig], args.options, about, "hf-curriculum-distill plan", unread
    )
    plan = make_plan(options, config)
    print(format_plan(plan))
    if unread:
        print(f"not read, for these are options of a recipe: {', '.join(unread)}")
    if options.json is not None:
        write_files({options.json: json.dumps(dataclasses.asdict(plan), indent=2).encode()})
    if plan.errors:
        raise ValueError("; ".join(plan.errors))


def _compare(args: Namespace) -> None:
    results = read_results(args.runs)
    methods = sorted({result["method"] for result in results})
    if args.baseline not in (None, *methods):
        raise ValueError(f"--baseline is {args.baseline!r}, but the runs' methods are {', '.join(methods)}.")
    baseline, output = args.baseline or "one_shot", args.output
    if output is None:
        output = args.runs[0]
        if is_checkpoint(output):
            output = os.path.relpath(os.path.dirname(os.path.realpath(output)))
    elif is_checkpoint(output):
        raise ValueError(f"--output is {output!r}, a checkpoint, and only the run writes there; name another folder.")
    print(format_summary(results, args.metric, args.threshold, baseline))
    if not any(result["finite"] for result in results):
        return
    if find_spec("matplotlib") is None:
        print('\nThe plot needs matplotlib: pip install "hf_curriculum_distill[plots]"')
        return
    os.makedirs(output, exist_ok=True)
    path = os.path.join(output, PLOT_FILE)
    plot_comparison(results, path, metric=args.metric, baseline=baseline)
    print(f"\nplot: {printable(path)}, and as SVG")


def parse_arguments(
    dataclass_types: Sequence[type],
    argv: Sequence[str] | None = None,
    description: str = "",
    prog: str | None = None,
    unread: list[str] | None = None,
) -> tuple:
    """Parse `[--config FILE.yaml] [--any_field value]` into dataclasses.

    A wrong key or value ends the program with exit status 2 and a line that says what to do, as argparse does.

    Args:
        dataclass_types: their fields are the options. A field that a subclass declares again, for another default,
            keeps its help.
        argv: the command line without the program's name; by default that of this process.
        description: what the program does.
        prog: the program's name; by default that of this process.
        unread: if given, the file's keys that are options of a recipe, but not of `dataclass_types`, are no errors but
            added to this list.

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
        for field in getattr(base, "__dataclass_fields__", {}).values()
        if "help" in field.metadata
    }
    for action in parser._actions:
        action.help = action.help or helps.get(action.dest)
    config_parser = ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    path = config_parser.parse_known_args(argv)[0].config
    try:
        if path is not None:
            defaults = _read_yaml(path)
            if unread is not None:
                unread += sorted(RECIPE_OPTIONS & {*defaults} - _options(parser), key=list(defaults).index)
                defaults = {key: value for key, value in defaults.items() if key not in unread}
            hints = {name: hint for kind in dataclass_types for name, hint in get_type_hints(kind).items()}
            for key, value in defaults.items():
                _check_option(str(key), parser, f"{path} sets")
                _check_type(key, value, hints[key], path)
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


def _read_yaml(path: str) -> dict[str, Any]:
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


if __name__ == "__main__":
    main()
