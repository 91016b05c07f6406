"""The command `hf-curriculum-distill`: train, plan, compare, fidelity, complexity.

What a command needs is imported when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import runpy
import sys
from argparse import Namespace
from collections.abc import Sequence
from glob import glob
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from hf_curriculum_distill.lines import CommandParser, printable


def main(argv: Sequence[str] | None = None) -> None:
    """Run `hf-curriculum-distill COMMAND ...`; an error ends it with exit status 2 and a line that says what is wrong.

    Args:
        argv: the command line without the program's name; by default that of this process.
    """
    parser = CommandParser("hf-curriculum-distill", description="Distil transformers, and look at what came out.")
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch"))
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {version('hf_curriculum_distill')} ({versions})"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    recipes = find_recipes()
    train = commands.add_parser(
        "train",
        help="Run a recipe: train students, and the teacher if there is none.",
        usage="%(prog)s [RECIPE] [--config FILE.yaml] [--option value ...]",
        description="Run a recipe. Its options: `%(prog)s RECIPE --help`. On several devices: `accelerate launch -m "
        "hf_curriculum_distill train RECIPE ...`.",
        allow_abbrev=False,
    )
    names = ", ".join(recipes)
    train.add_argument("recipe", metavar="RECIPE", nargs="?", help=f"One of {names}; by default the file's `recipe`.")
    train.add_argument("--config", metavar="FILE.yaml", help="YAML file of defaults for the recipe's options.")
    train.set_defaults(command=lambda _: _train([]))

    about = "Check a run before it starts; print its stages, operations, time and memory."
    plan = commands.add_parser("plan", help=about, add_help=False)  # its options are a recipe's: see `_plan`
    plan.set_defaults(command=lambda args: _plan(args.options))

    about = "Compare finished runs: a table with one line a method, a plot, and a page for a browser."
    compare = commands.add_parser("compare", help=about, description=about, allow_abbrev=False)
    compare.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="A recipe's output folder, or the folder or a checkpoint of one run. Runs of one method that differ in "
        "their seed alone share a line; others are named by the setting or folder that tells them apart. What is in a "
        "data set is not recorded.",
    )
    compare.add_argument("--metric", help="What is compared (default: eval_accuracy or, of other runs, eval_loss).")
    compare.add_argument(
        "--threshold",
        type=float,
        help="Its value to reach (default: the worst at which a run of the baseline ended; a share of 0 takes no "
        "learning and is no value to reach).",
    )
    compare.add_argument("--baseline", help="The method that the ratios compare with (default: one_shot, if there).")
    compare.add_argument(
        "--line",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="A value of the metric that is drawn across the plots, such as teacher=0.93; may be given several times.",
    )
    compare.add_argument(
        "--output",
        metavar="FOLDER",
        help="Where plot and page are written (default: the first RUN, or the run whose checkpoint that is).",
    )
    compare.add_argument("--html", metavar="FILE", help="The page's own place (default: comparison.html in --output).")
    compare.set_defaults(command=_compare)

    about = "Say how faithful a student is to its teacher: a few numbers, and a page for a browser."
    fidelity = commands.add_parser("fidelity", help=about, description=about, allow_abbrev=False)
    fidelity.add_argument("student", metavar="STUDENT", help="Its folder, or its name on the Hub.")
    fidelity.add_argument("teacher", metavar="TEACHER", help="Likewise.")
    fidelity.add_argument(
        "--dataset",
        required=True,
        metavar="DATA",
        help="Text to compare them on: a file, a glob, a folder or a Hub data set, with labels for a classifier.",
    )
    fidelity.add_argument("--dataset_config", metavar="NAME", help="Its configuration.")
    fidelity.add_argument(
        "--text_column", default="text", help="The column that holds the text (default: %(default)s)."
    )
    fidelity.add_argument(
        "--evaluate_on",
        default="test",
        help="Which held-out examples: 'test' or 'validation', as in the recipes (default: %(default)s).",
    )
    fidelity.add_argument("--examples", type=int, default=256, help="How many, at most (default: %(default)s).")
    fidelity.add_argument(
        "--length",
        type=int,
        default=128,
        help="Tokens of an example, at most of a labelled one (default: %(default)s).",
    )
    fidelity.add_argument("--batch_size", type=int, default=16, help="Examples of a pass (default: %(default)s).")
    fidelity.add_argument(
        "--html", metavar="FILE", default="fidelity.html", help="Where the page is written (default: %(default)s)."
    )
    fidelity.set_defaults(command=_report_fidelity)

    about = "How complex what a student learns from is for it, while it trains: a table and a plot."
    complexity = commands.add_parser("complexity", help=about, description=about, allow_abbrev=False)
    complexity.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="A run that was trained with SupervisionComplexityCallback, or the folder of several, which are averaged.",
    )
    complexity.add_argument(
        "--teacher",
        metavar="FOLDER",
        help="Measure the checkpoints of one RUN with this teacher: a model, or the folder of its training's "
        "checkpoints, which teach in turn as the online teacher.",
    )
    complexity.add_argument(
        "--dataset", help="Its held-out examples: images ('digits', files or a Hub data set) or texts with labels."
    )
    complexity.add_argument("--image_size", type=int, help="Pixels of a side, to which images are resized.")
    complexity.add_argument("--examples", type=int, default=512, help="Held-out examples (default: %(default)s).")
    complexity.add_argument(
        "--temperature", type=float, default=1.0, help="Of the teacher's probabilities (default: %(default)s)."
    )
    complexity.add_argument("--output", metavar="FOLDER", help="Where the plot is written (default: the first RUN).")
    complexity.set_defaults(command=_complexity)

    argv = sys.argv[1:] if argv is None else list(argv)
    own = argv[:1] == ["train"] and argv[1:2] not in ([], ["-h"], ["--help"])  # all that follows is for the recipe
    args, args.options = (Namespace(command=lambda _: _train(argv[1:])), []) if own else parser.parse_known_args(argv)
    if args.options and "plan" not in argv[:1]:
        parser.error(f"unrecognized arguments: {' '.join(args.options)}")
    try:
        args.command(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except RecursionError:
        parser.error("What a file holds is nested too deeply to be read.")


def find_recipes() -> dict[str, str]:
    """Find the recipes, inside the installed package or beside it in a clone of the repository.

    Returns:
        `name -> path` of each script that has a folder of configurations.
    """
    package = os.path.dirname(__file__)
    places = (os.path.join(package, "recipes"), os.path.join(os.path.dirname(package), "recipes"))
    folder = next(filter(os.path.isdir, places), places[0])
    names = sorted(os.path.basename(path) for path in glob(os.path.join(folder, "configs", "*")))
    return {name: os.path.join(folder, f"{name}.py") for name in names}


def _train(argv: Sequence[str]) -> None:
    """Run a recipe as `python recipes/NAME.py` does: the one that is named first, or in the file of options."""
    recipes, (name, options) = find_recipes(), _split_name(argv)
    name = name or _read_config(options).get("recipe")
    if name not in recipes:
        raise ValueError(
            f"The recipe is {name!r}; use one of {', '.join(recipes)}, as in `hf-curriculum-distill train RECIPE ...`, "
            "or write `recipe: RECIPE` into the file of --config."
        )
    sys.argv = [recipes[name], *options]
    runpy.run_path(recipes[name], run_name="__main__")


def _split_name(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The name that comes first, None if an option does; and the options."""
    return (argv[0], list(argv[1:])) if argv and not argv[0].startswith("-") else (None, list(argv))


def _read_config(options: Sequence[str]) -> dict[str, Any]:
    """What is in the file of `--config`; nothing if none is named."""
    path = _find_option("--config", options)
    if path is None:
        return {}
    from hf_curriculum_distill.parsing import read_yaml

    return read_yaml(path)


def _find_option(name: str, options: Sequence[str]) -> str | None:
    parser = CommandParser(add_help=False, allow_abbrev=False)
    parser.add_argument(name, dest="value")
    return parser.parse_known_args(options)[0].value


def _plan(argv: Sequence[str]) -> None:
    from hf_curriculum_distill.files import write_files
    from hf_curriculum_distill.parsing import parse_arguments
    from hf_curriculum_distill.planning import (
        PlanArguments,
        PlannedConfig,
        format_plan,
        make_plan,
        recipe_defaults,
        unread_options,
    )

    recipes, (name, words) = find_recipes(), _split_name(argv)
    given = _read_config(words)
    name = name or given.get("recipe")
    if name not in (None, *recipes):
        raise ValueError(f"The recipe is {name!r}; use one of {', '.join(recipes)}, or none.")
    gpu = _find_option("--gpu", words) or given.get("gpu")
    defaults = {} if name is None else recipe_defaults(recipes[name], given, gpu)
    unread = unread_options(recipes.values() if name is None else [recipes[name]], given)
    about = "Check a run before it starts; print its stages, operations, time and memory."
    options, config = parse_arguments(
        [PlanArguments, PlannedConfig], words, about, "hf-curriculum-distill plan", defaults, unread
    )
    plan = make_plan(options, config)
    print(format_plan(plan))
    if name is not None:
        print(f"defaults: those of the recipe {name}")
    if unread:
        print(f"not read, for these are options of a recipe: {', '.join(unread)}")
    if options.json is not None:
        write_files({options.json: json.dumps(dataclasses.asdict(plan), indent=2).encode()})
    if plan.errors:
        raise ValueError("; ".join(plan.errors))


def _compare(args: Namespace) -> None:
    from hf_curriculum_distill.files import write_files
    from hf_curriculum_distill.report.comparison import PAGE_FILE, compare_on_page
    from hf_curriculum_distill.report.curves import shared_metrics
    from hf_curriculum_distill.report.figures import PLOT_FILE, plot_comparison
    from hf_curriculum_distill.report.results import is_checkpoint, read_results
    from hf_curriculum_distill.report.tables import format_summary

    results = read_results(args.runs)
    methods = sorted({result["method"] for result in results})
    if args.baseline not in (None, *methods):
        raise ValueError(f"--baseline is {args.baseline!r}, but the runs' methods are {', '.join(methods)}.")
    baseline, output, metric = args.baseline or "one_shot", args.output, args.metric
    if metric is None:
        shared = shared_metrics(results)
        metric = "eval_loss" if "eval_loss" in shared and "eval_accuracy" not in shared else "eval_accuracy"
    lines = dict(map(_read_line, args.line))
    if output is None:
        output = args.runs[0]
        if is_checkpoint(output):
            output = os.path.relpath(os.path.dirname(os.path.realpath(output)))
    elif is_checkpoint(output):
        raise ValueError(f"--output is {output!r}, a checkpoint, and only the run writes there; name another folder.")
    print(format_summary(results, metric, args.threshold, baseline))
    if not any(result["finite"] for result in results):
        return
    os.makedirs(output, exist_ok=True)
    if find_spec("matplotlib") is None:
        print('\nThe plot needs matplotlib: pip install "hf_curriculum_distill[plots]"')
    else:
        path = os.path.join(output, PLOT_FILE)
        plot_comparison(results, path, metric=metric, baseline=baseline, lines=lines)
        print(f"\nplot: {printable(path)}, and as SVG")
    page = args.html or os.path.join(output, PAGE_FILE)
    write_files({page: compare_on_page(results, metric, args.threshold, baseline, lines)})
    print(f"page: {printable(page)}")


def _report_fidelity(args: Namespace) -> None:
    from hf_curriculum_distill.files import write_files
    from hf_curriculum_distill.options import TextOptions
    from hf_curriculum_distill.report.fidelity_page import METRICS
    from hf_curriculum_distill.report.fidelity_run import report_fidelity
    from hf_curriculum_distill.report.tables import align

    for name in ("examples", "length", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must be at least 1.")
    names = ("student", "teacher", "dataset", "dataset_config", "text_column", "evaluate_on")
    given = {name: getattr(args, name) for name in names}
    options = TextOptions(block_size=args.length, eval_blocks=args.examples, **given)
    metrics, page = report_fidelity(options, args.batch_size)
    print(align([["measure", "value"], *([text, f"{metrics[n]:.4f}"] for n, text in METRICS.items() if n in metrics)]))
    write_files({args.html: page})
    print(f"\npage: {printable(args.html)}")


def _read_line(text: str) -> tuple[str, float]:
    name, _, value = text.rpartition("=")
    try:
        if not name or not math.isfinite(number := float(value)):
            raise ValueError
    except ValueError:
        raise ValueError(f"--line is {text!r}; write NAME=VALUE with a finite value, as in teacher=0.93.") from None
    return name, number


def _complexity(args: Namespace) -> None:
    from hf_curriculum_distill.complexity.along import COMPLEXITY_FILE, measure_run, write_points
    from hf_curriculum_distill.report.complexity import (
        COMPLEXITY_PLOT,
        format_complexity,
        held_out_inputs,
        plot_complexity,
        read_runs,
    )

    if (args.teacher is None) != (args.dataset is None):
        raise ValueError("--teacher and --dataset belong together: both to measure checkpoints, or none.")
    if args.teacher is not None:
        if len(args.runs) > 1 or os.path.exists(os.path.join(args.runs[0], COMPLEXITY_FILE)):
            raise ValueError(
                f"--teacher measures one RUN that has no {COMPLEXITY_FILE} yet; leave it out to show them."
            )
        inputs = held_out_inputs(args.dataset, args.runs[0], args.examples, args.image_size)
        points = []
        for point in measure_run(args.runs[0], args.teacher, inputs, args.temperature):
            print(f"step {point.step}: {point.seconds:.1f} s", flush=True)
            points.append(point)
        write_points(args.runs[0], points)
    runs, output = read_runs(args.runs), args.output or args.runs[0]
    print(format_complexity(runs))
    if find_spec("matplotlib") is None:
        print('\nThe plot needs matplotlib: pip install "hf_curriculum_distill[plots]"')
        return
    os.makedirs(output, exist_ok=True)
    plot_complexity(runs, path := os.path.join(output, COMPLEXITY_PLOT))
    print(f"\nplot: {printable(path)}, and as SVG")


if __name__ == "__main__":
    main()
