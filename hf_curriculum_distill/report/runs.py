"""Several methods on equal footing: how the runs of a comparison are trained, and what each leaves.

[`compare_methods`] is what a recipe does; a recipe of its own kind calls [`plan_runs`], [`train_all`] and
[`train_student`] itself.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import transformers
from transformers import CONFIG_NAME, PreTrainedModel
from transformers.trainer_utils import sort_checkpoints

from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.layers.blocks import backbone_config
from hf_curriculum_distill.layers.students import project_embeddings
from hf_curriculum_distill.logs import get_logger
from hf_curriculum_distill.options import ComparisonOptions
from hf_curriculum_distill.projections import ProjectionBank
from hf_curriculum_distill.report.figures import PLOT_FILE, plot_comparison
from hf_curriculum_distill.report.launch import Run, earlier_result, planned_or_exit
from hf_curriculum_distill.report.results import RESULTS_FILE, read_results, update_results
from hf_curriculum_distill.report.tables import format_summary, format_table
from hf_curriculum_distill.resuming.checkpoints import find_last_checkpoint
from hf_curriculum_distill.teachers.vocabularies import shared_vocabulary
from hf_curriculum_distill.trainer import CurriculumDistillationTrainer

logger = get_logger(__name__)

# what a training without a teacher, of a teacher for instance, has in place of its students' arguments
LABELS_ALONE = {
    "stages": [{"label_weight": 1.0}],
    "teacher_entropy_threshold": None,
    "teacher_cache": None,
    "push_to_hub": False,
}

_METRICS = ("eval_loss", "eval_accuracy", "eval_agreement", "eval_kl", "eval_cosine")


def compare_methods(
    recipe: ComparisonOptions,
    args: CurriculumDistillationConfig,
    find_teacher: Callable[..., Any],
    distil: Callable[[Run, Any], dict[str, Any]],
    recipe_logger: logging.Logger,
    threshold: float | None = None,
) -> str:
    """A recipe from its options to the table: plan the runs, find the teacher, train every student.

    Args:
        recipe: the recipe's options.
        args: what all runs share.
        find_teacher: `find_teacher(recipe, args)` trains the teacher if it is not there yet, and returns what `distil`
            needs of it.
        distil: `distil(run, teacher)` trains the student of one run: see [`train_student`].
        recipe_logger: says what happens, on the main process only, as the logger of this module does.
        threshold: the accuracy whose cost the table states: see [`format_summary`].

    Returns:
        the table of all runs in `args.output_dir`, and the command that plots it; on the main process only.

    Raises:
        SystemExit: the options describe no runs; it says what is wrong with them.
    """
    log_progress(recipe_logger, args)
    transformers.utils.logging.disable_progress_bar()  # one line a run says more here than a bar a checkpoint
    runs = planned_or_exit(recipe, args)
    teacher = find_teacher(recipe, args)
    train_all(runs, lambda run: distil(run, teacher), args)
    if not args.should_save:
        return ""
    results = read_results([args.output_dir])
    option = "" if threshold is None else f" --threshold {threshold:g}"
    return (
        f"{format_summary(results, threshold=threshold)}\n\n"
        f"plot: hf-curriculum-distill compare {args.output_dir}{option}"
    )


def log_progress(recipe_logger: logging.Logger, args: CurriculumDistillationConfig) -> None:
    """Have a recipe's logger and this module's say what happens, on the main process, without any prefix."""
    for each in (recipe_logger, logger):
        each.setLevel(logging.INFO if args.should_log else logging.WARNING)
        each.propagate = False
        if not each.handlers:
            each.addHandler(logging.StreamHandler())


def teacher_arguments(
    args: CurriculumDistillationConfig, folder: str, max_steps: int, batch_size: int, every: int, **others: Any
) -> CurriculumDistillationConfig:
    """The arguments with which a recipe trains the teacher of its students, on labels alone.

    Args:
        args: those of the students, of which the rest is taken.
        folder: where the teacher and its checkpoints are written.
        max_steps: optimizer steps.
        batch_size: examples of a step and device.
        every: steps between two evaluations and checkpoints.
        others: fields that differ from `args`, too.
    """
    return dataclasses.replace(
        args,
        output_dir=folder,
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        learning_rate=args.teacher_learning_rate,
        restart_schedule_per_stage=False,
        eval_strategy="steps",
        eval_steps=every,
        logging_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_only_model=True,
        **LABELS_ALONE,
        **others,
    )


def check_kept_teacher(folder: str, facts: Mapping[str, tuple[Any, Any]]) -> None:
    """Whether the teacher of an earlier launch is the one that the options describe.

    Args:
        folder: where it was kept.
        facts: name of a fact -> what it is of the teacher there, and what the options say.

    Raises:
        SystemExit: a fact is another; it says which.
    """
    for name, (there, wanted) in facts.items():
        if there != wanted:
            raise SystemExit(
                f"{folder} holds a teacher with {name}={there}, but the options ask for {wanted}; name another folder "
                "in --teacher."
            )


def keep_teacher(trainer: CurriculumDistillationTrainer, folder: str) -> None:
    """Save a trained teacher, its configuration last: a folder that has one holds a whole model.

    Args:
        trainer: that has trained the teacher; the model is written into its `output_dir` first.
        folder: of the teacher.
    """
    written = os.path.join(trainer.args.output_dir, "model")
    trainer.save_model(written)
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        os.makedirs(folder, exist_ok=True)
        for name in sorted(os.listdir(written), key=lambda name: name == CONFIG_NAME):
            os.replace(os.path.join(written, name), os.path.join(folder, name))
        os.rmdir(written)
    trainer.accelerator.wait_for_everyone()


def _clear(folder: str, runs: Sequence[str]) -> None:
    """Remove what says that runs which are trained again have ended, and the checkpoints that a resume would find."""
    if os.path.exists(os.path.join(folder, RESULTS_FILE)):
        update_results(folder, [], runs)
    for checkpoint in (checkpoint for run in runs for checkpoint in sort_checkpoints(run)):
        logger.info("%s is removed, because its run is trained again", checkpoint)
        shutil.rmtree(checkpoint)


def train_all(
    runs: Sequence[Run], distil: Callable[[Run], dict[str, Any]], args: CurriculumDistillationConfig
) -> list[dict[str, Any]]:
    """Train one run after another, log how each ended, and keep `results.json` up to date.

    A launch that resumes leaves a finished run without a whole checkpoint as it is. One with `overwrite_output_dir`
    removes the checkpoints of the runs that it trains again, before it trains any.

    Args:
        runs: those that [`plan_runs`] returns.
        distil: trains the student of one run: see [`train_student`].
        args: what all runs share; `results.json` is written into its `output_dir`.

    Returns:
        The objects of these runs in `results.json`, which keeps those of earlier launches, too: see [`read_results`].
    """
    results: list[dict[str, Any]] = []
    folders = [run.args.output_dir for run in runs]
    if args.should_save and not args.resume_from_checkpoint and any(run.recipe.overwrite_output_dir for run in runs):
        _clear(args.output_dir, folders)
    for run, folder in zip(runs, folders, strict=True):
        there = earlier_result(args.output_dir, folder) if args.resume_from_checkpoint else None
        if there and there["finite"] and find_last_checkpoint(folder) is None:
            logger.info("%s is finished and has no checkpoint to go on from; it stays as it is", folder)
            results.append(result := there)
        else:
            results.append(result := distil(run))
        if args.should_save:
            update_results(args.output_dir, results, folders[: len(results)])
            logger.info("%s, seed %d: %s", run.method, run.args.seed, _describe(result))
    return results


def summarize(teacher: Mapping[str, Any], args: CurriculumDistillationConfig, title: str) -> str:
    """Draw the runs in `args.output_dir` that ended well there, if there are several, and describe all of them.

    Args:
        teacher: its metrics, and "(teacher)" as its method.
        args: what all runs share.
        title: of the plot.

    Returns:
        a table with a line for each, and the name of the plot.
    """
    results = read_results([args.output_dir])
    table = format_table([teacher, *results])
    finite = [result for result in results if result["finite"]]
    if len(finite) < 2:
        return table
    plot = os.path.join(args.output_dir, PLOT_FILE)
    plot_comparison(finite, plot, title, lines={"teacher": teacher["eval_accuracy"]})
    return f"{table}\n\nplot: {plot}"


def check_finite(results: Sequence[Mapping[str, Any]]) -> None:
    """End the process with a line for each run that broke, if any did."""
    if broken := [f"{result['path']}: {result['error']}" for result in results if not result["finite"]]:
        raise SystemExit("\n".join(broken))


def _describe(result: Mapping[str, Any]) -> str:
    if not result["finite"]:
        return result["error"]
    name = "accuracy" if "eval_accuracy" in result else "cosine"
    return f"{name} {result[f'eval_{name}']:.4f} after {result['samples']:,} examples, {result['seconds']:.0f} s"


def start_embeddings(student: PreTrainedModel, teacher: PreTrainedModel, run: Run, tokenizer: Any) -> PreTrainedModel:
    """Set a new student's embeddings as the run's `student_embeddings` says: see [`project_embeddings`].

    Args:
        tokenizer: of both.

    Returns:
        the student, changed in place.
    """
    if run.recipe.student_embeddings == "random":
        return student
    widths = [[backbone_config(model).hidden_size] for model in (student, teacher)]
    kind, seed = run.args.projection, run.args.projection_seed
    bank = ProjectionBank.create([(1, 1)], *widths, kind, seed, shared=True)
    return project_embeddings(student, teacher, bank, shared_vocabulary(student, teacher, tokenizer))


def train_student(trainer: CurriculumDistillationTrainer, method: str) -> dict[str, Any]:
    """Train, evaluate and save a student; returns its object in `results.json`.

    With `args.resume_from_checkpoint` training goes on from that folder or, for "last", from the run's last checkpoint
    if it has one. A run whose loss or weights stop being finite has `finite: false` and the error in its
    object, and no metrics.

    Args:
        trainer: holds the student.
        method: the name of the run's method in `results.json`.
    """
    args = trainer.args
    run = {"method": method, "seed": args.seed, "path": args.output_dir}
    try:
        resumed = args.resume_from_checkpoint
        trainer.train(resume_from_checkpoint=resumed if resumed is None or os.path.isdir(resumed) else True)
        metrics = trainer.evaluate()
    except FloatingPointError as error:
        return run | {"finite": False, "error": str(error)}
    trainer.save_model()
    trainer.save_state()
    spent = next(entry for entry in reversed(trainer.state.log_history) if "student_flops" in entry)
    steps = trainer.state.global_step
    return run | {
        **{name: metrics[name] for name in _METRICS if name in metrics},
        "samples": num_examples(args, steps),
        "steps": steps,
        "student_flops": spent["student_flops"],
        "teacher_flops": spent["teacher_flops"],
        "seconds": trainer.train_seconds,
        "finite": True,
    }


def num_examples(args: CurriculumDistillationConfig, steps: int) -> int:
    """Examples that training takes in a number of optimizer steps, on all devices together."""
    return steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
