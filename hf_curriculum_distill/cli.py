"""The command `hf-curriculum-distill`: train, plan, compare, complexity.

What a command needs is imported when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import sys
from argparse import Namespace
from collections.abc import Sequence
from glob import glob
from importlib.metadata import version
from importlib.util import find_spec

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
    if args.options and args.command is not _plan:
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
    recipes, name, options = find_recipes(), None, list(argv)
    if options and not options[0].startswith("-"):
        name = options.pop(0)
    else:
        parser = CommandParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--config")
        if (config := parser.parse_known_args(options)[0].config) is not None:
            from hf_curriculum_distill.parsing import read_yaml

            name = read_yaml(config).get("recipe")
    if name not in recipes:
        raise ValueError(
            f"The recipe is {name!r}; use one of {', '.join(recipes)}, as in `hf-curriculum-distill train RECIPE ...`, "
            "or write `recipe: RECIPE` into the file of --config."
        )
    sys.argv = [recipes[name], *options]
    runpy.run_path(recipes[name], run_name="__main__")


def _plan(args: Namespace) -> None:
    from hf_curriculum_distill.files import write_files
    from hf_curriculum_distill.parsing import parse_arguments
    from hf_curriculum_distill.planning import PlanArguments, PlannedConfig, format_plan, make_plan

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
    from hf_curriculum_distill.report.results import is_checkpoint, read_results
    from hf_curriculum_distill.report.tables import PLOT_FILE, format_summary, plot_comparison

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
