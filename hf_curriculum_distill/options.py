"""Options that several command lines share: those of the recipes and of `hf-curriculum-distill plan`.

A subclass changes a default by declaring the field again; the help stays what it is here: see
`parsing.parse_arguments`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from transformers import CONFIG_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from hf_curriculum_distill.config import CurriculumDistillationConfig


def is_saved_model(folder: str) -> bool:
    """Whether a folder has a configuration and weights; a save that was killed may leave the first alone."""
    weights = SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME
    has = [os.path.isfile(os.path.join(folder, name)) for name in (CONFIG_NAME, *weights)]
    return has[0] and any(has[1:])


def teacher_source(teacher: str | None, teacher_from: str | None) -> str | None:
    """The teacher or, if that is yet to be trained, what it is made from; arguments as in [`ModelOptions`]."""
    return teacher if teacher_from is None or (teacher and is_saved_model(teacher)) else teacher_from


@dataclass
class RecipeConfig(CurriculumDistillationConfig):
    """The library's configuration with the defaults that recipes share."""

    lr_scheduler_type: str = "cosine"
    bf16: bool = field(default_factory=lambda: torch.cuda.is_available() and torch.cuda.is_bf16_supported())
    eval_strategy: str = "steps"
    eval_steps: float = 0.1
    save_steps: float = 0.1
    logging_steps: float = 0.1
    report_to: str = "none"


@dataclass
class ModelOptions:
    """Which models a run of `bert_large.py`, or a plan of a run, consists of, and on how much of a text."""

    student: str | None = field(
        default=None,
        metadata={
            "help": "Student: a size as bert-large or bert-LAYERS-HIDDEN, or a config.json (both randomly "
            "initialised), a model's folder or OWNER/NAME of the Hub (its weights are the start, and its tokenizer "
            "must be the teacher's), teacher-LAYERS (that many of the teacher's blocks, evenly spread) or "
            "teacher-LAYERS-HIDDEN (the teacher's family in another width, randomly initialised)."
        },
    )
    teacher: str | None = field(
        default=None,
        metadata={"help": "Teacher: a Hub model or a folder. A plan takes a size or a config.json, too."},
    )
    teacher_from: str | None = field(
        default=None,
        metadata={
            "help": "Train a teacher into the folder --teacher unless it is there, from this: a size, a config.json, "
            "or a model, which is trained on and gets a head if it has none."
        },
    )
    tokenizer: str | None = field(default=None, metadata={"help": "Tokenizer, if it is not the teacher's."})
    block_size: int = field(default=512, metadata={"help": "Tokens of an example: of a block of packed text."})
    mlm_probability: float | None = field(
        default=None,
        metadata={
            "help": "Share of the tokens that is masked, whose labels count: 0.15 for a masked language model. A plan "
            "of another task counts all by default."
        },
    )
    dropout: float = field(
        default=0.1,
        metadata={"help": "Dropout of models that are made by size or trained on by bert_large.py."},
    )


@dataclass
class ComparisonOptions:
    """Which students a comparison trains: see `launch.plan_runs`."""

    shared_by_runs: ClassVar[frozenset[str]] = frozenset()
    """The options of a recipe that a variant cannot set, because the recipe reads them once."""

    methods: list[str] = field(
        default_factory=lambda: ["curriculum", "one_shot"],
        metadata={"help": "What to compare: methods of the library, or names from `variants`."},
    )
    variants: dict | str | None = field(
        default=None, metadata={"help": "Name -> options in which it differs (JSON on the command line)."}
    )
    seeds: list[int] | None = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of students and their data; --seed alone if none."}
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Train again where a finished run left something; runs of other methods and seeds stay."},
    )


@dataclass
class EmbeddingOptions:
    """How the student of a text recipe starts: see [`~report.runs.start_embeddings`]."""

    student_embeddings: str = field(
        default="random",
        metadata={
            "help": "How the embeddings of a randomly initialised student start: 'random', or 'projected', as the "
            "teacher's through the projection's one matrix."
        },
    )


@dataclass
class TextOptions(ModelOptions, EmbeddingOptions):
    """Which models a language-model recipe trains, and on which text: see `tasks.documents`.

    Raises:
        ValueError: `evaluate_on` is unknown.
    """

    dataset: str = field(
        default="wikimedia/wikipedia",
        metadata={
            "help": "A file, a glob or a folder of parquet, JSON, CSV, TSV or text files, or a Hub data set. Files are "
            "split by their names, as train.txt and validation.txt."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration; 20231101.en for Wikipedia."})
    text_column: str = field(default="text", metadata={"help": "The column that holds the text."})
    train_documents: int | None = field(default=None, metadata={"help": "Documents to train on, at most; all if none."})
    heldout_documents: int | None = field(
        default=None,
        metadata={
            "help": "Documents held out for evaluation where the data has no validation split; by default 2,000 or "
            "10 %, whichever is less, and 2,000 of a stream."
        },
    )
    eval_blocks: int = field(default=1024, metadata={"help": "Held-out blocks that are evaluated, at most."})
    evaluate_on: str = field(
        default="test",
        metadata={"help": "The first held-out blocks are the 'test' set; the 'validation' set, as many, follows them."},
    )
    preprocessing_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})

    def __post_init__(self):
        if self.evaluate_on not in ("test", "validation"):
            raise ValueError(f"evaluate_on is {self.evaluate_on!r}; use 'test' or 'validation'.")
