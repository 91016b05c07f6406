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

import csv
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from glob import glob
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import (
    CONFIG_NAME,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    set_seed,
)

from hf_curriculum_distill import CurriculumDistillationConfig, CurriculumDistillationTrainer
from hf_curriculum_distill.layers import find_block_stack, make_student, student_size
from hf_curriculum_distill.options import ComparisonOptions
from hf_curriculum_distill.parsing import parse_arguments
from hf_curriculum_distill.planning import SIZES, find_config, find_size
from hf_curriculum_distill.report.runs import (
    LABELS_ALONE,
    Run,
    check_kept_teacher,
    compare_methods,
    num_examples,
    planned_or_exit,
    train_student,
)

logger = logging.getLogger("text_classification")

_CSV = {"keep_default_na": False}  # a text may be "None", "null" or "nan"
# suffix -> kind of file, and how it is read; quotation marks in a TSV are part of the text
READERS = {
    ".tsv": ("csv", {**_CSV, "sep": "\t", "quoting": csv.QUOTE_NONE}),
    ".csv": ("csv", _CSV),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}
TEXT_NAMES, LABEL_NAMES = ("text", "sentence"), ("label", "labels")  # usual names of columns


@dataclass
class RecipeArguments(ComparisonOptions):
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Texts with labels: a file or glob of TSV, CSV, JSON or parquet (all to train on), a folder of "
            "them (split by their names), or a Hub data set. Splits that it lacks are held out."
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
            "folder, teacher-LAYERS (that many of the teacher's blocks, evenly spread) or teacher-LAYERS-HIDDEN (the "
            "teacher's family in another width, randomly initialised)."
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
        if not (os.path.exists(self.student) or find_size(self.student)):
            raise ValueError(
                f"{self.student!r} is no student: use {', '.join(SIZES)}, bert-LAYERS-HIDDEN, teacher-LAYERS, "
                "teacher-LAYERS-HIDDEN, or a config.json or model folder that exists."
            )


@dataclass
class TrainingConfig(CurriculumDistillationConfig):
    """The library's configuration with this job's defaults."""

    output_dir: str | None = "runs/text_classification"
    max_steps: int = 2000
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 128
    learning_rate: float = 1e-3
    teacher_learning_rate: float | None = 1e-4
    weight_decay: float = 0.01
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.1
    bf16: bool = field(default_factory=lambda: torch.cuda.is_available() and torch.cuda.is_bf16_supported())
    eval_strategy: str = "steps"
    eval_steps: float = 0.1
    save_steps: float = 0.1
    save_total_limit: int | None = 1
    logging_steps: float = 0.1
    disable_tqdm: bool | None = True
    report_to: str = "none"


@dataclass(frozen=True)
class Task:
    """Training and held-out texts, each a data set with the columns `text` and `label`, and the labels' names."""

    train: Dataset
    heldout: Dataset
    names: dict[Any, str]  # label -> name, in the order of the classes


def main():
    recipe, args = parse_arguments([RecipeArguments, TrainingConfig], description=__doc__.split("\n")[0])
    for each in (recipe, *(run.recipe for run in planned_or_exit(recipe, args))):
        check_models(each)
    summary = compare_methods(recipe, args, find_teacher, distil, logger)
    if args.should_save:
        print(f"\n{summary}")


def distil(run: Run, _: None) -> dict:
    """Train one student."""
    recipe, args = run.recipe, run.args
    set_seed(args.seed)
    teacher = AutoConfig.from_pretrained(recipe.teacher)
    tokenizer = AutoTokenizer.from_pretrained(recipe.tokenizer or recipe.teacher)
    if student_size(recipe.student) is None:
        student = make_model(recipe.student, recipe.dropout, tokenizer, teacher.id2label)
    else:
        student = make_student(recipe.student, AutoModelForSequenceClassification.from_pretrained(recipe.teacher))
    data = encode_task(read_task(recipe), recipe, tokenizer, teacher.id2label)
    if recipe.unlabelled_text is not None and (steps := num_layer_steps(args, student, teacher)):
        data["train_dataset"] = in_order(recipe, args, tokenizer, steps, data["train_dataset"])
        args = replace(args, train_sampling_strategy="sequential")
    trainer = CurriculumDistillationTrainer(model=student, args=args, teacher_model=recipe.teacher, **data)
    trainer.remove_callback(PrinterCallback)
    return train_student(trainer, run.method)


# ---- models ----


def check_models(recipe: RecipeArguments) -> None:
    """End with one line, before data is read, if a model is out of reach or a teacher has no such student."""
    try:
        teacher = find_config(teacher_source(recipe))
        student = find_config(recipe.student, teacher=teacher)
        AutoTokenizer.from_pretrained(recipe.tokenizer or teacher_source(recipe))
    except (OSError, ValueError) as error:
        raise SystemExit(" ".join(str(error).split())) from error
    room = min(getattr(config, "max_position_embeddings", recipe.max_length) for config in (teacher, student))
    if recipe.max_length > room:
        raise SystemExit(f"max_length is {recipe.max_length}, but the models have room for {room} tokens; lower it.")


def teacher_source(recipe: RecipeArguments) -> str:
    """The teacher or, if it is yet to be trained, what it is made from."""
    is_there = recipe.teacher_from is None or os.path.isfile(os.path.join(recipe.teacher, CONFIG_NAME))
    return recipe.teacher if is_there else recipe.teacher_from


def find_teacher(recipe: RecipeArguments, args: TrainingConfig) -> None:
    """Train the teacher if it is not there yet, log how good it is, and refuse one that knows nothing."""
    task = read_task(recipe)
    tokenizer = AutoTokenizer.from_pretrained(recipe.tokenizer or teacher_source(recipe))
    args = replace(
        args,
        output_dir=recipe.teacher + "-training",
        stages=LABELS_ALONE,
        teacher_cache=None,
        max_steps=recipe.teacher_steps,
        per_device_train_batch_size=recipe.teacher_batch_size,
        learning_rate=args.teacher_learning_rate,
        push_to_hub=False,
    )
    if teacher_source(recipe) != recipe.teacher:
        train_teacher(recipe, args, task, tokenizer)
    elif recipe.teacher_from is not None:
        there, wanted = AutoConfig.from_pretrained(recipe.teacher), find_config(recipe.teacher_from)
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads")
        check_kept_teacher(recipe.teacher, {size: (getattr(there, size), getattr(wanted, size)) for size in sizes})
    model = AutoModelForSequenceClassification.from_pretrained(recipe.teacher)
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
    set_seed(args.seed)
    model = make_model(recipe.teacher_from, recipe.dropout, tokenizer, dict(enumerate(task.names.values())))
    trainer = make_trainer(model, args, task, recipe, tokenizer)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model(recipe.teacher)
    trainer.accelerator.wait_for_everyone()


def make_trainer(
    model: PreTrainedModel,
    args: TrainingConfig,
    task: Task,
    recipe: RecipeArguments,
    tokenizer: PreTrainedTokenizerBase,
) -> CurriculumDistillationTrainer:
    """Of the teacher, on the labels."""
    data = encode_task(task, recipe, tokenizer, model.config.id2label)
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
    if find_size(name) or os.path.isfile(name):
        return AutoModelForSequenceClassification.from_config(config)
    return AutoModelForSequenceClassification.from_pretrained(name, config=config)


# ---- data ----


def read_task(recipe: RecipeArguments) -> Task:
    """Read the training texts and the held-out ones, and check that they describe one task.

    Splits that the data set lacks are held out of the training texts, 2,000 or 10 %, by a fixed seed.
    """
    source, heldout_name = recipe.dataset, recipe.evaluate_on
    splits = read_dataset(source, recipe.dataset_config)
    columns = splits["train"].features
    label = find_column(source, columns, "label_column", recipe.label_column)
    others = {name: kind for name, kind in columns.items() if name != label}
    text = find_column(source, others, "text_column", recipe.text_column)
    for split in ("test", "validation"):
        if split not in splits:
            train, number = splits["train"], min(2000, len(splits["train"]) // 10)
            if not number:
                raise SystemExit(f"{source} has {len(train)} texts, too few to hold some out as {split} set.")
            splits["train"], splits[split] = train.train_test_split(test_size=number, seed=0).values()
    for split in ("train", heldout_name):
        if missing := {text, label} - {*splits[split].column_names}:
            raise SystemExit(f"The {split} set of {source} has no column {missing.pop()!r}, as the training set has.")
    train, heldout = (
        splits[split].select_columns([text, label]).rename_columns({text: "text", label: "label"})
        for split in ("train", heldout_name)
    )
    labels, heldout_labels = set(train["label"]), set(heldout["label"])
    if None in labels | heldout_labels or any(None in part["text"] for part in (train, heldout)):
        raise SystemExit(f"{source} has rows without a {text} or a {label}; fill them in, or leave them out.")
    if len(labels) < 2:
        raise SystemExit(
            f"All training texts of {source} have the {label} {min(labels)!r}; a classifier needs two or more classes."
        )
    if unknown := heldout_labels - labels:
        raise SystemExit(
            f"The {heldout_name} set of {source} has the {label} {min(unknown)!r}, which no training text has; correct "
            "it, or evaluate on another set with --evaluate_on."
        )
    if isinstance(columns[label], ClassLabel):
        return Task(train, heldout, dict(enumerate(columns[label].names)))
    return Task(train, heldout, {value: str(value) for value in sorted(labels)})


def read_dataset(source: str, config: str | None) -> DatasetDict:
    """The splits of a file, a glob, a folder or a Hub data set."""
    files = [source] if os.path.isfile(source) else sorted(glob(source)) if not os.path.isdir(source) else []
    inside = files or glob(os.path.join(source, "**"), recursive=True)
    suffixes = {suffix for suffix in (os.path.splitext(file)[1] for file in inside) if suffix in READERS}
    if len(suffixes) > 1 or (inside and not suffixes) or (not inside and os.path.splitext(source)[1] in READERS):
        found = f"files of several kinds, {', '.join(sorted(suffixes))}" if suffixes else "no such file"
        raise SystemExit(f"{source} is {found}; name files, or a folder, of one of {', '.join(READERS)}.")
    kind, options = READERS[suffixes.pop()] if suffixes else (None, {})
    try:
        if files:
            splits = load_dataset(kind, data_files={"train": files}, **options)
        else:
            splits = load_dataset(source, config, **options)
    except (OSError, ValueError, DatasetGenerationError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise SystemExit(f"{source} can't be read as a data set: {reason}") from error
    if "train" not in splits:
        raise SystemExit(f"{source} has the splits {', '.join(splits)}, but none to train on; name its file 'train'.")
    return splits


def find_column(source: str, columns: Mapping[str, Any], option: str, given: str | None) -> str:
    """The column of texts or labels: the one that is given, has a usual name, or is the only one of its kind.

    Args:
        source: the data set, for the error.
        columns: name -> feature.
        option: that names the column, `label_column` for that of labels.
        given: its value, if the user has set it.
    """
    kinds = {n: getattr(kind, "dtype", type(kind).__name__).removeprefix("large_") for n, kind in columns.items()}
    strings = [name for name, kind in kinds.items() if kind == "string"]
    numbers = [name for name, kind in kinds.items() if re.match("u?int|bool", kind)]
    if option == "label_column":
        fitting, usual = [*numbers, *strings], LABEL_NAMES
        others = numbers or [name for name in strings if name not in TEXT_NAMES]
    else:
        fitting, usual, others = strings, TEXT_NAMES, strings
    if given is not None:
        found = [name for name in fitting if name == given]
    else:
        found = [name for name in fitting if name in usual] or others
    if len(found) != 1:
        what = "labels" if option == "label_column" else "texts"
        problem = "is not clear" if given is None else f"can't be {given!r}"
        there = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise SystemExit(f"Which column of {source} holds the {what} {problem}; name one of {there} with --{option}.")
    return found[0]


def encode_task(
    task: Task, recipe: RecipeArguments, tokenizer: PreTrainedTokenizerBase, classes: Mapping[int, str]
) -> dict[str, Any]:
    """The task's texts as tokens and its labels as the teacher's classes, as the Trainer's arguments."""
    numbers = class_numbers(task, recipe, classes)
    train, heldout = (
        encode(part, "text", recipe, tokenizer).add_column("labels", [numbers[label] for label in part["label"]])
        for part in (task.train, task.heldout)
    )
    return {
        "train_dataset": train,
        "eval_dataset": heldout,
        "data_collator": DataCollatorWithPadding(tokenizer),
        "processing_class": tokenizer,
    }


def class_numbers(task: Task, recipe: RecipeArguments, classes: Mapping[int, str]) -> dict[Any, int]:
    """The teacher's class of each label: the one of its name or, where labels are whole numbers, of its number."""
    known = {name: number for number, name in classes.items()}
    if {*task.names.values()} <= known.keys():
        return {value: known[name] for value, name in task.names.items()}
    if all(type(value) is int and value in classes for value in task.names):
        return {value: value for value in task.names}
    raise SystemExit(
        f"{recipe.teacher} knows the classes {', '.join(known)}, but {recipe.dataset} has "
        f"{', '.join(task.names.values())}; use a teacher that was trained on these, or correct the labels."
    )


def encode(texts: Dataset, column: str, recipe: RecipeArguments, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Tokenize a column of texts; all other columns are left out."""
    return texts.map(
        lambda batch: tokenizer(batch[column], truncation=True, max_length=recipe.max_length),
        batched=True,
        remove_columns=texts.column_names,
    )


# ---- layer stages on other text ----


def num_layer_steps(args: TrainingConfig, student: PreTrainedModel, teacher: PreTrainedConfig) -> int:
    """The steps of the layer stages that begin a training, which need no labels; 0 where there are none."""
    if args.max_steps < 1:
        raise SystemExit("unlabelled_text needs max_steps, for epochs of two data sets together have no length.")
    stages = args.resolve_stages(len(find_block_stack(student)), teacher.num_hidden_layers)
    schedule = args.schedule(stages, args.max_steps)
    first = next((index for index, stage in enumerate(stages) if stage.needs_logits), len(stages))
    return schedule.span(first - 1)[1] if first else 0


def in_order(
    recipe: RecipeArguments, args: TrainingConfig, tokenizer: PreTrainedTokenizerBase, steps: int, task: Dataset
) -> Dataset:
    """All examples of a training in their order: unlabelled texts for the first steps, then those of the task.

    The texts are cut into sentences and count no label: their row is `{"input_ids": [...], "attention_mask": [...],
    "labels": -100}`.
    """
    documents = read_dataset(recipe.unlabelled_text, recipe.unlabelled_config)["train"]
    column = find_column(recipe.unlabelled_text, documents.features, "unlabelled_column", recipe.unlabelled_column)
    before, after = num_examples(args, steps), num_examples(args, args.max_steps - steps)
    sentences = draw_sentences(documents, column, before, args.seed)
    if not sentences:
        raise SystemExit(f"The column {column!r} of {recipe.unlabelled_text} holds no text.")
    texts = Dataset.from_dict({"text": sentences}).select(epochs(len(sentences), before, args.seed))
    texts = encode(texts, "text", recipe, tokenizer).add_column("labels", [-100] * before)
    return concatenate_datasets([texts, task.select(epochs(len(task), after, args.seed))])


def draw_sentences(documents: Dataset, column: str, count: int, seed: int) -> list[str]:
    """Sentences of documents in a random order, `count` of them at most, cut where ., ! or ? or a line ends."""
    sentences: list[str] = []
    for index in epochs(len(documents), len(documents), seed).tolist():
        if len(sentences) >= count:
            break
        parts = re.split(r"(?<=[.!?])\s+|\n+", documents[index][column] or "")
        sentences += [part.strip() for part in parts if part.strip()]
    return sentences[:count]


def epochs(num_rows: int, count: int, seed: int) -> np.ndarray:
    """`count` row numbers: all rows in a random order, then in another, and so on."""
    draw = np.random.default_rng(seed)
    orders = [draw.permutation(num_rows) for _ in range(math.ceil(count / num_rows))]
    return np.concatenate([np.empty(0, np.int64), *orders])[:count]


if __name__ == "__main__":
    main()
