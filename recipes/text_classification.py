"""Text classification: a fine-tuned encoder, and small students that learn from it by several methods.

SST-2, from a MiniLM that is fine-tuned first, one CPU core:
    python recipes/text_classification.py --config recipes/configs/text_classification/sst2.yaml
Texts and labels of your own, in data/train.csv and data/test.csv:
    python recipes/text_classification.py --dataset data --teacher runs/mine/teacher \
        --teacher_from sentence-transformers/all-MiniLM-L6-v2 --student bert-3-192 --output_dir runs/mine
What comes out: results.json and a table; again, with a plot, by `hf-curriculum-distill compare runs/mine`.

The teacher learns from labels and is kept for the next launch. A student is a size, a configuration, a model, or some
of the teacher's layers; its classes are the teacher's. With --unlabelled_text, often in a variant, the layer stages
read any other text in place of the task's, which then is for the logit stage: one training, as long as all others.
"""

import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    set_seed,
)

from hf_curriculum_distill import CurriculumDistillationTrainer
from hf_curriculum_distill.layers import find_block_stack, make_student, student_size
from hf_curriculum_distill.lines import errors_in_one_line
from hf_curriculum_distill.options import ComparisonOptions, EmbeddingOptions, RecipeConfig, teacher_source
from hf_curriculum_distill.parsing import parse_arguments
from hf_curriculum_distill.planning import SIZES, find_config, find_size, is_config_only, is_hub_name
from hf_curriculum_distill.report.checks import (
    check_embeddings,
    check_models,
    check_student_tokenizer,
    load_tokenizer,
    teacher_files,
)
from hf_curriculum_distill.report.launch import Run, planned_or_exit
from hf_curriculum_distill.report.runs import (
    LABELS_ALONE,
    check_kept_teacher,
    compare_methods,
    keep_teacher,
    num_examples,
    start_embeddings,
    train_student,
)
from hf_curriculum_distill.tasks.classification import Task, draw_sentences, encode, encode_task, epochs, read_task
from hf_curriculum_distill.tasks.reading import find_column, read_dataset

logger = logging.getLogger("text_classification")
TASK = "SequenceClassification"  # for `hf-curriculum-distill plan text_classification`


@dataclass
class RecipeArguments(ComparisonOptions, EmbeddingOptions):
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Texts with labels: a file (to train on), a glob or a folder of TSV, CSV, JSON or parquet (split "
            "by their names), or a Hub data set. Splits that it lacks are held out."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration on the Hub."})
    text_column: str | None = field(default=None, metadata={"help": "The column of texts, if that is not clear."})
    label_column: str | None = field(default=None, metadata={"help": "The column of labels, if that is not clear."})
    max_length: int = field(default=128, metadata={"help": "Tokens after which a text is cut."})
    evaluate_on: str = field(
        default="test", metadata={"help": "Held-out set: 'validation', to choose settings, or 'test', to report."}
    )
    unlabelled_text: str | None = field(
        default=None,
        metadata={
            "help": "Data set, as --dataset, whose sentences the layer stages read in place of the task's texts."
        },
    )
    unlabelled_config: str | None = field(default=None, metadata={"help": "Its configuration on the Hub."})
    unlabelled_column: str | None = field(default=None, metadata={"help": "Its column of texts, if that is not clear."})
    teacher: str | None = field(
        default=None, metadata={"help": "A trained classifier: a folder (written with --teacher_from) or a Hub model."}
    )
    teacher_from: str | None = field(
        default=None,
        metadata={
            "help": "Train the teacher unless it is there, from this: an encoder, which gets a head, a size, or a "
            "config.json."
        },
    )
    teacher_steps: int = field(default=650, metadata={"help": "Steps of the teacher's training, on the labels."})
    teacher_batch_size: int = field(default=32, metadata={"help": "Texts a step of that training."})
    allow_untrained_teacher: bool = field(
        default=False, metadata={"help": "Take a teacher that is no better than the most frequent class."}
    )
    tokenizer: str | None = field(default=None, metadata={"help": "Tokenizer, if it is not the teacher's."})
    student: str = field(
        default="bert-3-192",
        metadata={
            "help": "Student: a size as bert-LAYERS-HIDDEN or a config.json (both randomly initialised), a model's "
            "folder or OWNER/NAME of the Hub (its weights are the start, and its tokenizer must be the teacher's), "
            "teacher-LAYERS (that many of the teacher's blocks, evenly spread) or teacher-LAYERS-HIDDEN (the teacher's "
            "family in another width, randomly initialised)."
        },
    )
    dropout: float = field(default=0.1, metadata={"help": "Dropout of models that are made by size."})

    def __post_init__(self):
        if self.dataset is None:
            raise ValueError("No data set is given; name a file, a folder or a Hub data set with --dataset.")
        if self.teacher is None:
            raise ValueError(
                "No teacher is given; name a trained classifier with --teacher, or a folder for the one that is to be "
                "trained from --teacher_from."
            )
        if self.evaluate_on not in ("validation", "test"):
            raise ValueError(f"evaluate_on is {self.evaluate_on!r}; use 'validation' or 'test'.")
        if self.max_length < 3:
            raise ValueError(f"max_length is {self.max_length}; two special tokens and one of text need at least 3.")
        if not (os.path.exists(self.student) or find_size(self.student) or is_hub_name(self.student)):
            raise ValueError(
                f"{self.student!r} is no student: use {', '.join(SIZES)}, bert-LAYERS-HIDDEN, teacher-LAYERS, "
                "teacher-LAYERS-HIDDEN, a config.json or model folder that exists, or OWNER/NAME of a model on the Hub."
            )


@dataclass
class TrainingConfig(RecipeConfig):
    """The recipes' configuration with this job's defaults."""

    output_dir: str | None = "runs/text_classification"
    max_steps: int = 2000
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 128
    learning_rate: float = 5e-4
    teacher_learning_rate: float | None = 1e-4
    weight_decay: float = 0.01
    warmup_steps: float = 0.1
    save_total_limit: int | None = 1
    disable_tqdm: bool | None = True


@errors_in_one_line()
def main():
    recipe, args = parse_arguments([RecipeArguments, TrainingConfig], description=__doc__.split("\n")[0])
    for run in planned_or_exit(recipe, args):
        check_run(run)
        if run.recipe.unlabelled_text is not None:
            read_unlabelled(run.recipe)  # raises before a teacher is trained
    summary = compare_methods(recipe, args, find_teacher, distil, logger)
    if args.should_save:
        print(f"\n{summary}")


def distil(run: Run, _: None) -> dict:
    """Train one student."""
    recipe, args = run.recipe, run.args
    set_seed(args.seed)
    teacher = AutoConfig.from_pretrained(recipe.teacher, **teacher_files(recipe, args))
    tokenizer = load_tokenizer(recipe, args)
    student = start_student(run, tokenizer, teacher.id2label)
    data = as_tokens(read(recipe), recipe, tokenizer, teacher.id2label)
    if recipe.unlabelled_text is not None and (steps := num_layer_steps(args, student, teacher)):
        data["train_dataset"] = in_order(recipe, args, tokenizer, steps, data["train_dataset"])
        args = replace(args, train_sampling_strategy="sequential")
    trainer = CurriculumDistillationTrainer(model=student, args=args, teacher_model=recipe.teacher, **data)
    trainer.remove_callback(PrinterCallback)
    return train_student(trainer, run.method)


# ---- models ----


def start_student(run: Run, tokenizer: PreTrainedTokenizerBase, classes: Mapping[int, str]) -> PreTrainedModel:
    """The student before its first step."""
    recipe, of_teacher = run.recipe, student_size(run.recipe.student) is not None
    if not of_teacher and recipe.student_embeddings == "random":
        return make_model(recipe.student, recipe.dropout, tokenizer, classes)
    where = teacher_files(recipe, run.args)
    teacher = AutoModelForSequenceClassification.from_pretrained(recipe.teacher, **where)
    if of_teacher:
        student = make_student(recipe.student, teacher)
    else:
        student = make_model(recipe.student, recipe.dropout, tokenizer, classes)
    return start_embeddings(student, teacher, run, tokenizer)


def check_run(run: Run) -> None:
    """Check models, vocabulary and steps before the data are read."""
    recipe = run.recipe
    source = teacher_source(recipe.teacher, recipe.teacher_from)
    teacher, tokenizer = find_config(source, where=teacher_files(recipe, run.args)), load_tokenizer(recipe, run.args)
    check_embeddings(recipe.student, recipe.student_embeddings, run.args, teacher)
    if recipe.teacher_from not in (None, source):
        wanted, sizes = find_config(recipe.teacher_from), ("hidden_size", "num_hidden_layers", "num_attention_heads")
        check_kept_teacher(source, {size: (getattr(teacher, size), getattr(wanted, size)) for size in sizes})
    check_student_tokenizer(recipe.student, tokenizer)
    configs = find_config(recipe.student, teacher=teacher, vocab_size=len(tokenizer)), teacher
    with torch.device("meta"):
        models = [AutoModelForSequenceClassification.from_config(config) for config in configs]
    check_models(run.args, *models, tokenizer, ("max_length", recipe.max_length))


def find_teacher(recipe: RecipeArguments, args: TrainingConfig) -> None:
    """Train the teacher if it is not there yet, log how good it is, and refuse one that knows nothing."""
    task = read(recipe)
    tokenizer = load_tokenizer(recipe, args)
    args = replace(args, **LABELS_ALONE)
    if teacher_source(recipe.teacher, recipe.teacher_from) != recipe.teacher:
        train_teacher(recipe, args, task, tokenizer)
    model = AutoModelForSequenceClassification.from_pretrained(recipe.teacher, **teacher_files(recipe, args))
    args = replace(args, report_to="none")
    accuracy = make_trainer(model, args, task, recipe, tokenizer).evaluate()["eval_accuracy"]
    share = max(Counter(task.heldout["label"]).values()) / len(task.heldout)
    logger.info(
        "%s: accuracy %.4f on the %s set of %d texts, whose most frequent class is %.4f of all",
        recipe.teacher, accuracy, recipe.evaluate_on, len(task.heldout), share,
    )  # fmt: skip
    if accuracy <= share and not recipe.allow_untrained_teacher:
        raise SystemExit(
            f"{recipe.teacher} is right on {accuracy:.1%} of the {recipe.evaluate_on} set, {share:.1%} of which are of "
            "one class, so it has nothing to teach; train another one from --teacher_from, or set "
            "--allow_untrained_teacher."
        )


def train_teacher(
    recipe: RecipeArguments, args: TrainingConfig, task: Task, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Train a teacher on the labels, from --teacher_from; a launch that was killed goes on from its last checkpoint."""
    logger.info("%s: training a teacher on the labels, from %s", recipe.teacher, recipe.teacher_from)
    args = replace(
        args,
        output_dir=recipe.teacher + "-training",
        max_steps=recipe.teacher_steps,
        per_device_train_batch_size=recipe.teacher_batch_size,
        learning_rate=args.teacher_learning_rate,
    )
    set_seed(args.seed)
    model = make_model(recipe.teacher_from, recipe.dropout, tokenizer, dict(enumerate(task.names.values())))
    trainer = make_trainer(model, args, task, recipe, tokenizer)
    trainer.train(resume_from_checkpoint=True)
    keep_teacher(trainer, recipe.teacher)


def make_trainer(
    model: PreTrainedModel,
    args: TrainingConfig,
    task: Task,
    recipe: RecipeArguments,
    tokenizer: PreTrainedTokenizerBase,
) -> CurriculumDistillationTrainer:
    """Of the teacher, on the labels."""
    data = as_tokens(task, recipe, tokenizer, model.config.id2label)
    trainer = CurriculumDistillationTrainer(model=model, args=args, **data)
    trainer.remove_callback(PrinterCallback)
    return trainer


def make_model(
    name: str, dropout: float, tokenizer: PreTrainedTokenizerBase, classes: Mapping[int, str]
) -> PreTrainedModel:
    """A classifier: a size or a config.json, randomly initialised, or a model's weights, with a head if it has none."""
    config = find_config(name, dropout, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    config.id2label, config.label2id = dict(classes), {name: number for number, name in classes.items()}
    config.problem_type = "single_label_classification"
    if is_config_only(name):
        return AutoModelForSequenceClassification.from_config(config)
    return AutoModelForSequenceClassification.from_pretrained(name, config=config, dtype=torch.float32)


# ---- data ----


def read(recipe: RecipeArguments) -> Task:
    return read_task(recipe.dataset, recipe.dataset_config, recipe.evaluate_on, recipe.text_column, recipe.label_column)


def as_tokens(
    task: Task, recipe: RecipeArguments, tokenizer: PreTrainedTokenizerBase, classes: Mapping[int, str]
) -> dict[str, Any]:
    """The task's texts and labels as the Trainer's arguments."""
    train, heldout = encode_task(task, tokenizer, recipe.max_length, classes, recipe.teacher)
    return {
        "train_dataset": train,
        "eval_dataset": heldout,
        "data_collator": DataCollatorWithPadding(tokenizer),
        "processing_class": tokenizer,
    }


# ---- layer stages on other text ----


def num_layer_steps(args: TrainingConfig, student: PreTrainedModel, teacher: PreTrainedConfig) -> int:
    """The steps of the layer stages that begin a training, which need no labels; 0 where there are none."""
    if args.max_steps < 1:
        raise ValueError("unlabelled_text needs max_steps, for epochs of two data sets together have no length.")
    stages = args.resolve_stages(len(find_block_stack(student)), teacher.num_hidden_layers)
    schedule = args.schedule(stages, args.max_steps)
    first = next((index for index, stage in enumerate(stages) if stage.needs_logits), len(stages))
    return schedule.span(first - 1)[1] if first else 0


def read_unlabelled(recipe: RecipeArguments) -> tuple[Dataset, str]:
    """Documents, and the column of their text."""
    documents = read_dataset(recipe.unlabelled_text, recipe.unlabelled_config)["train"]
    names = recipe.unlabelled_text, documents.features, "unlabelled_column", recipe.unlabelled_column
    return documents, find_column(*names)


def in_order(
    recipe: RecipeArguments, args: TrainingConfig, tokenizer: PreTrainedTokenizerBase, steps: int, task: Dataset
) -> Dataset:
    """All examples of a training in their order: unlabelled texts for the first steps, then those of the task.

    The texts are cut into sentences and count no label: their row is `{"input_ids": [...], "attention_mask": [...],
    "labels": -100}`.
    """
    documents, column = read_unlabelled(recipe)
    before, after = num_examples(args, steps), num_examples(args, args.max_steps - steps)
    sentences = draw_sentences(documents, column, before, args.seed)
    if not sentences:
        raise ValueError(f"The column {column!r} of {recipe.unlabelled_text} holds no text.")
    texts = Dataset.from_dict({"text": sentences}).select(epochs(len(sentences), before, args.seed))
    texts = encode(texts, "text", tokenizer, recipe.max_length).add_column("labels", [-100] * before)
    return concatenate_datasets([texts, task.select(epochs(len(task), after, args.seed))])


if __name__ == "__main__":
    main()
