"""What a recipe checks before it reads data: tokenizer, models, stages, steps and output folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from transformers import CONFIG_NAME, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import sort_checkpoints

from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.files import check_writable
from hf_curriculum_distill.layers import find_block_stack, student_size
from hf_curriculum_distill.options import teacher_source
from hf_curriculum_distill.planning.models import is_config_only, is_hub_name, num_positions
from hf_curriculum_distill.projections.matrices import MEASURED
from hf_curriculum_distill.report.results import RESULTS_FILE, earlier_results
from hf_curriculum_distill.teachers.loading import tokenizer_folder
from hf_curriculum_distill.teachers.pretrained import file_arguments


def teacher_files(recipe: Any, args: CurriculumDistillationConfig) -> dict[str, Any]:
    """The arguments of `from_pretrained` that say where the files of a recipe's teacher are, as the trainer reads them.

    Raises:
        ValueError: they name a subfolder, but the recipe trains the teacher, into the folder itself.
    """
    where = file_arguments(args.teacher_model_init_kwargs)
    if recipe.teacher_from is not None and "subfolder" in where:
        raise ValueError(
            f"teacher_model_init_kwargs has 'subfolder': {where['subfolder']!r}, but teacher_from trains a teacher "
            f"into {recipe.teacher} itself; leave one of the two out."
        )
    return {} if teacher_source(recipe.teacher, recipe.teacher_from) != recipe.teacher else where


def load_tokenizer(recipe: Any, args: CurriculumDistillationConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that a recipe's options name: `tokenizer`, else that of `teacher` or of `teacher_from`.

    Raises:
        OSError: there is none.
        ValueError: see [`teacher_files`].
    """
    name = recipe.tokenizer or teacher_source(recipe.teacher, recipe.teacher_from)
    where = {} if recipe.tokenizer else file_arguments(teacher_files(recipe, args), of_tokenizer=True)
    try:
        return AutoTokenizer.from_pretrained(name, **where)
    except (OSError, ValueError) as error:
        raise OSError(
            f"There is no tokenizer of {name!r} within reach; name one with --tokenizer. ({error})"
        ) from error


def check_student_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a student that starts from weights was trained on the tokens that the run reads.

    Args:
        name: the student, as `--student` names it. If no tokenizer is saved beside its weights, nothing is compared.
        tokenizer: of the run.

    Raises:
        ValueError: its tokenizer has other tokens, or gives them other ids.
    """
    if student_size(name) or is_config_only(name) or (folder := tokenizer_folder(name)) is None:
        return
    if AutoTokenizer.from_pretrained(folder).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"The student {name!r} was trained with a tokenizer that maps tokens to other ids than the run's, which is "
            "the teacher's; start from a model with the teacher's tokenizer, or from a size."
        )


def check_embeddings(
    name: str, student_embeddings: str, args: CurriculumDistillationConfig, teacher: PreTrainedConfig
) -> None:
    """Check that a student's embeddings can start as an option says.

    Args:
        name: the student, as `--student` names it.
        student_embeddings: see [`~options.EmbeddingOptions`].
        args: of the run.
        teacher: the configuration of the teacher.

    Raises:
        ValueError: they cannot.
    """
    if student_embeddings not in ("random", "projected"):
        raise ValueError(f"student_embeddings is {student_embeddings!r}; use 'random' or 'projected'.")
    if student_embeddings == "random":
        return
    size = student_size(name)
    if (size and size[1] is None) or os.path.isdir(name) or is_hub_name(name):
        raise ValueError(
            f"student_embeddings is 'projected', but the student {name!r} has embeddings to start from; leave it out, "
            "or start from a size."
        )
    if size and size[1] == teacher.get_text_config().hidden_size:
        raise ValueError(
            f"student_embeddings is 'projected', but the student {name!r} is as wide as the teacher and has its "
            "embeddings as they are; leave it out, or name another width."
        )
    if args.method in ("curriculum", "hidden") and not args.shared_projection:
        raise ValueError(
            "With student_embeddings='projected' the student starts in the basis of one matrix, but the targets of "
            "each layer have a matrix of their own; set --shared_projection true."
        )
    if args.projection in MEASURED:
        raise ValueError(
            f"With student_embeddings='projected' the student starts from the projection's matrix, but that of a "
            f"{args.projection!r} is measured when training begins; use --projection gaussian or orthogonal."
        )


def check_models(
    args: CurriculumDistillationConfig,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    length: tuple[str, int],
) -> None:
    """Check, before data are read, that two models make a run: their vocabulary, their room, the stages and the steps.

    Args:
        args: of the run.
        student, teacher: models without values are enough.
        tokenizer: of both.
        length: an option's name and its value, the tokens of an example.

    Raises:
        ValueError: they do not.
    """
    models = {"student": student, "teacher": teacher}
    for who, model in models.items():
        if len(tokenizer) > model.config.get_text_config().vocab_size:
            raise ValueError(
                f"The tokenizer has {len(tokenizer):,} tokens, but the {who}'s vocabulary "
                f"{model.config.get_text_config().vocab_size:,} entries; name the models' own with --tokenizer."
            )
    room = min(num_positions(model) or length[1] for model in models.values())
    if length[1] > room:
        raise ValueError(f"{length[0]} is {length[1]}, but the models have room for {room} tokens; lower it.")
    check_steps(args, *(len(find_block_stack(model, args.layer_stack)) for model in models.values()))


def check_steps(args: CurriculumDistillationConfig, student_depth: int, teacher_depth: int) -> None:
    """Check that the stages fit the models' blocks and, if their number is set, the steps.

    Args:
        args: of the run.
        student_depth, teacher_depth: numbers of blocks.

    Raises:
        ValueError: they do not.
    """
    stages = args.resolve_stages(student_depth, teacher_depth)
    if args.max_steps > 0:
        args.schedule(stages, args.max_steps)


def check_output(args: CurriculumDistillationConfig, folders: Sequence[str], overwrite: bool) -> None:
    """Check that runs can be written, and that nothing of a finished one is written over.

    Args:
        args: what all runs share; with `resume_from_checkpoint` they go on from what is there.
        folders: of the runs.
        overwrite: whether they may write over a finished run.

    Raises:
        OSError: `output_dir` cannot be written, or holds what an earlier run left.
        ValueError: `resume_from_checkpoint` is neither "last" nor a folder, or the `results.json` there, which keeps
            the runs of earlier launches, is damaged.
    """
    folder = os.path.abspath(args.output_dir)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    check_writable(folder, "output_dir", "students")  # makes none that later checks would leave empty
    resumed = args.resume_from_checkpoint
    if resumed and resumed.lower() not in ("last", "true") and not os.path.isdir(resumed):
        raise ValueError(
            f"resume_from_checkpoint is {resumed!r}, which is no folder; name a checkpoint, or say last for the last "
            "one of each run."
        )
    if overwrite or resumed:
        earlier_results(args.output_dir, folders)
        return
    left = [os.path.join(args.output_dir, RESULTS_FILE)]
    left += [os.path.join(each, CONFIG_NAME) for each in folders]
    left += [checkpoint for each in folders for checkpoint in sort_checkpoints(each)]
    if found := next(filter(os.path.exists, left), None):
        raise FileExistsError(
            f"{found} is what an earlier run left; name another --output_dir, go on with "
            "--resume_from_checkpoint last, or train again with --overwrite_output_dir."
        )
