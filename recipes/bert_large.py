"""Distil BERT-large into a BERT student on Wikipedia.

The real job, on the GPUs of this machine:
    accelerate launch recipes/bert_large.py
A smaller student:
    accelerate launch recipes/bert_large.py --student bert-6-768 --max_steps 50000
The whole pipeline in minutes on two CPU cores, teacher included:
    accelerate launch --cpu recipes/bert_large.py --config recipes/configs/bert_large/quickstart.yaml

The defaults: teacher google-bert/bert-large-uncased, data wikimedia/wikipedia 20231101.en in packed blocks of 512
tokens, 15 % of each masked (80/10/10), 32 x 512 = 16,384 tokens a step and process, bf16 on a GPU, fused AdamW.
--methods curriculum one_shot labels trains three students on the same data, in the same order, for as many steps.
Any option can stand in a YAML file; the command line wins.
"""

import logging
import os
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    PreTrainedModel,
    set_seed,
)

from hf_curriculum_distill import CurriculumDistillationTrainer
from hf_curriculum_distill.layers import make_student, student_size
from hf_curriculum_distill.lines import errors_in_one_line
from hf_curriculum_distill.options import ComparisonOptions, RecipeConfig, TextOptions, teacher_source
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
    check_finite,
    check_kept_teacher,
    keep_teacher,
    log_progress,
    start_embeddings,
    summarize,
    train_all,
    train_student,
)
from hf_curriculum_distill.tasks.documents import evaluated_blocks, load_documents
from hf_curriculum_distill.tasks.text import MaskedBlocksCollator, mask_once, pack_blocks, tokenize_documents

logger = logging.getLogger("bert_large")
TASK = "MaskedLM"  # for `hf-curriculum-distill plan bert_large`


@dataclass
class RecipeArguments(TextOptions, ComparisonOptions):
    shared_by_runs: ClassVar[frozenset[str]] = frozenset(
        {
            *("dataset", "dataset_config", "text_column", "train_documents", "heldout_documents", "eval_blocks"),
            *("evaluate_on", "preprocessing_workers", "tokenizer", "block_size", "packed", "streaming", "whole_words"),
            *("mlm_probability", "mask_once", "teacher_from", "teacher_steps", "allow_untrained_teacher"),
        }
    )

    methods: list[str] = field(default_factory=lambda: ["curriculum"])
    seeds: list[int] | None = None
    student: str = "bert-large"
    teacher: str = "google-bert/bert-large-uncased"
    mlm_probability: float = 0.15
    teacher_steps: int = field(default=1000, metadata={"help": "Steps of a teacher's training, on the labels."})
    streaming: bool = field(default=False, metadata={"help": "Read the data while training instead of before."})
    packed: bool = field(
        default=True, metadata={"help": "Join documents and cut them into blocks; if False, a block is one document."}
    )
    whole_words: bool = field(default=False, metadata={"help": "Mask whole words instead of single WordPieces."})
    mask_once: bool = field(
        default=False,
        metadata={"help": "Mask the training blocks once for all epochs; teacher_cache needs that."},
    )
    allow_untrained_teacher: bool = field(
        default=False, metadata={"help": "Take a teacher that hardly knows more than the most frequent token."}
    )


@dataclass
class TrainingConfig(RecipeConfig):
    """The recipes' configuration with this job's defaults."""

    output_dir: str | None = "runs/bert_large"
    max_steps: int = 100_000
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 32
    learning_rate: float = 2e-4
    teacher_learning_rate: float | None = 1e-3
    weight_decay: float = 0.01
    warmup_steps: float = 0.05
    optim: str = "adamw_torch_fused"
    eval_steps: float = 2000
    save_steps: float = 2000
    save_total_limit: int | None = 2
    logging_steps: float = 50
    dataloader_num_workers: int = 4
    # training goes on while a batch is copied to the GPU
    accelerator_config: dict | str | None = field(default_factory=lambda: {"non_blocking": True})
    report_to: str = "tensorboard"


@errors_in_one_line()
def main():
    recipe, args = parse_arguments([RecipeArguments, TrainingConfig], description=__doc__.split("\n")[0])
    log_progress(logger, args)
    runs = planned_or_exit(recipe, args)
    for run in runs:
        check_run(run)
    tokenizer = load_tokenizer(recipe, args)
    if recipe.streaming:
        for run in runs:
            run.args.accelerator_config.dispatch_batches = False  # each process reads shards of its own
    with args.main_process_first(desc="data"):
        train, heldout = load_data(recipe, tokenizer)
    pipeline = {
        "train_dataset": train,
        "eval_dataset": heldout,
        "processing_class": tokenizer,
        "data_collator": MaskedBlocksCollator(
            tokenizer, recipe.mlm_probability, fixed_count=True, whole_words=recipe.whole_words
        ),
    }
    teacher = find_teacher(recipe, args, pipeline)
    results = train_all(runs, partial(distil, pipeline), args)
    if args.should_save:
        print(f"\n{summarize(teacher, args, f'{recipe.student} from {recipe.teacher}')}")
    check_finite(results)


def distil(pipeline: dict, run: Run) -> dict:
    """Train one student; returns its object in results.json."""
    set_seed(run.args.seed)
    trainer = CurriculumDistillationTrainer(
        model=start_student(run, pipeline["processing_class"]),
        args=run.args,
        teacher_model=run.recipe.teacher,
        **pipeline,
    )
    stages = "measured" if run.args.measures_order else " -> ".join(stage.name for stage in trainer.stages)
    logger.info("%s: %s", run.args.output_dir, stages)
    return train_student(trainer, run.method)


def find_teacher(recipe: RecipeArguments, args: TrainingConfig, pipeline: dict) -> dict:
    """The teacher's own accuracy; with --teacher_from, after training it on the labels if it is not there yet."""
    args = replace(args, **LABELS_ALONE)
    if teacher_source(recipe.teacher, recipe.teacher_from) != recipe.teacher:
        train_teacher(recipe, args, pipeline)
    model = AutoModelForMaskedLM.from_pretrained(recipe.teacher, **teacher_files(recipe, args))
    args = replace(args, report_to="none")
    accuracy = CurriculumDistillationTrainer(model=model, args=args, **pipeline).evaluate()["eval_accuracy"]
    share = share_of_most_frequent(pipeline["eval_dataset"])
    logger.info(
        "%s: masked top-1 %.4f on the %s set, whose most frequent token is %.4f of all",
        recipe.teacher, accuracy, recipe.evaluate_on, share,
    )  # fmt: skip
    if accuracy < 2 * share and not recipe.allow_untrained_teacher:
        raise SystemExit(
            f"{recipe.teacher} is right on {accuracy:.1%} of the masked tokens, {share:.1%} of which are one and the "
            "same token, so it has next to nothing to teach; train it on with --teacher_from, or set "
            "--allow_untrained_teacher."
        )
    return {"method": "(teacher)", "eval_accuracy": accuracy}


def share_of_most_frequent(heldout: Dataset) -> float:
    """What always guessing the most frequent token would get right."""
    counts = Counter(label for labels in heldout["labels"] for label in labels if label != -100)
    return max(counts.values()) / counts.total()


def train_teacher(recipe: RecipeArguments, args: TrainingConfig, pipeline: dict) -> None:
    """Train a teacher on the labels, from --teacher_from; a launch that was killed goes on from its last checkpoint."""
    logger.info("%s: training a teacher on the labels, from %s", recipe.teacher, recipe.teacher_from)
    set_seed(args.seed)
    model = make_model(recipe.teacher_from, recipe.dropout, pipeline["processing_class"])
    peak = args.learning_rate if args.teacher_learning_rate is None else args.teacher_learning_rate
    folder = recipe.teacher + "-training"
    args = replace(args, output_dir=folder, max_steps=recipe.teacher_steps, learning_rate=peak)
    trainer = CurriculumDistillationTrainer(model=model, args=args, **pipeline)
    trainer.train(resume_from_checkpoint=True)
    keep_teacher(trainer, recipe.teacher)


def start_student(run: Run, tokenizer) -> PreTrainedModel:
    """The student before its first step."""
    recipe, of_teacher = run.recipe, student_size(run.recipe.student) is not None
    if not of_teacher and recipe.student_embeddings == "random":
        return make_model(recipe.student, recipe.dropout, tokenizer)
    teacher = load_model(recipe.teacher, recipe.dropout, **teacher_files(recipe, run.args))
    if of_teacher:
        student = make_student(recipe.student, teacher)
    else:
        student = make_model(recipe.student, recipe.dropout, tokenizer)
    return start_embeddings(student, teacher, run, tokenizer)


def make_model(size: str, dropout: float, tokenizer) -> PreTrainedModel:
    """A masked language model: a size or a config.json, randomly initialised, or the weights of a model."""
    check_size(size)
    if not is_config_only(size):
        return load_model(size, dropout)
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    return AutoModelForMaskedLM.from_config(find_config(size, dropout, **tokens))


def load_model(name: str, dropout: float, **where: Any) -> PreTrainedModel:
    """A saved model, to train on in float32."""
    config = AutoConfig.from_pretrained(name, **where)
    for field_name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):  # other families name theirs otherwise
        if hasattr(config, field_name):
            setattr(config, field_name, dropout)
    return AutoModelForMaskedLM.from_pretrained(name, config=config, dtype=torch.float32, **where)


def check_run(run: Run) -> None:
    """Check models, vocabulary and steps before the data are read."""
    recipe = run.recipe
    check_size(recipe.student)
    if recipe.teacher_from is not None and student_size(recipe.teacher_from):
        raise SystemExit(f"teacher_from is {recipe.teacher_from!r}, a student of a teacher; name a size or a model.")
    source, tokenizer = teacher_source(recipe.teacher, recipe.teacher_from), load_tokenizer(recipe, run.args)
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    teacher = find_config(source, recipe.dropout, where=teacher_files(recipe, run.args), **tokens)
    check_embeddings(recipe.student, recipe.student_embeddings, run.args, teacher)
    if recipe.teacher_from not in (None, source):
        wanted, sizes = find_config(recipe.teacher_from), ("hidden_size", "num_hidden_layers", "num_attention_heads")
        check_kept_teacher(source, {size: (getattr(teacher, size), getattr(wanted, size)) for size in sizes})
    check_student_tokenizer(recipe.student, tokenizer)
    student = find_config(recipe.student, recipe.dropout, teacher, **tokens)
    with torch.device("meta"):
        models = [AutoModelForMaskedLM.from_config(config) for config in (student, teacher)]
    check_models(run.args, *models, tokenizer, ("block_size", recipe.block_size))


def check_size(size: str) -> None:
    if not (os.path.exists(size) or find_size(size) or is_hub_name(size)):
        raise SystemExit(
            f"{size!r} is no model: use {', '.join(SIZES)}, bert-LAYERS-HIDDEN, teacher-LAYERS, teacher-LAYERS-HIDDEN, "
            "a config.json or model folder that exists, or OWNER/NAME of a model on the Hub."
        )


def load_data(recipe: RecipeArguments, tokenizer) -> tuple[Dataset | IterableDataset, Dataset]:
    """Packed training blocks, and held-out blocks that are masked once and for all."""
    if recipe.mask_once and recipe.streaming:
        raise SystemExit("mask_once masks the blocks before training, so it can't be used with streaming.")
    to_blocks = pack_blocks if recipe.packed else tokenize_documents
    pack = partial(to_blocks, tokenizer=tokenizer, block_size=recipe.block_size, text_column=recipe.text_column)
    train, heldout = load_documents(recipe, recipe.streaming)
    train = pack(train, num_proc=recipe.preprocessing_workers)
    if recipe.mask_once:
        train = mask_once(train, tokenizer, recipe.mlm_probability, seed=1)
    return train, mask_once(evaluated_blocks(pack(heldout), recipe), tokenizer, recipe.mlm_probability, seed=0)


if __name__ == "__main__":
    main()
