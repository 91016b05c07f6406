"""Sentence embeddings: an encoder's pooled states, taught to smaller encoders; cosines and neighbours compared.

MiniLM's 6 layers to 3 on sentences of Wikipedia, one CPU core:
    python recipes/embeddings.py --config recipes/configs/embeddings/minilm.yaml --dataset data/wikipedia-en
What comes out: results.json and a table. `cosine` is the mean similarity of a student's embedding to the teacher's (in
the student's width) and `neighbours` the share of a sentence's ten nearest neighbours, among all held-out sentences,
that are the teacher's ten; both on held-out sentences, before and after training.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    AutoModel,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    set_seed,
)

from hf_curriculum_distill import CurriculumDistillationTrainer
from hf_curriculum_distill.layers import make_student, student_size
from hf_curriculum_distill.layers.pooling import pooled
from hf_curriculum_distill.lines import errors_in_one_line
from hf_curriculum_distill.options import ComparisonOptions, EmbeddingOptions, RecipeConfig
from hf_curriculum_distill.parsing import parse_arguments
from hf_curriculum_distill.planning import find_config, is_config_only
from hf_curriculum_distill.report.checks import check_embeddings, check_models, check_student_tokenizer
from hf_curriculum_distill.report.launch import Run, planned_or_exit
from hf_curriculum_distill.report.results import read_results
from hf_curriculum_distill.report.runs import (
    log_progress,
    num_examples,
    start_embeddings,
    train_all,
    train_student,
)
from hf_curriculum_distill.tasks.classification import draw_sentences, encode
from hf_curriculum_distill.tasks.reading import find_column, num_held_out, read_dataset
from hf_curriculum_distill.teachers.pretrained import file_arguments

logger = logging.getLogger("embeddings")


@dataclass
class RecipeArguments(ComparisonOptions, EmbeddingOptions):
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Texts, which are cut into sentences: a file, a glob or a folder of TSV, CSV, JSON or parquet "
            "(split by their names), or a Hub data set. A validation split that it lacks is held out."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration on the Hub."})
    text_column: str | None = field(default=None, metadata={"help": "The column of texts, if that is not clear."})
    heldout_sentences: int = field(default=2000, metadata={"help": "Sentences to compare embeddings of."})
    max_length: int = field(default=64, metadata={"help": "Tokens after which a sentence is cut."})
    teacher: str | None = field(
        default=None, metadata={"help": "An encoder: a folder or a Hub model; its pooling is --pooling."}
    )
    student: str = field(
        default="teacher-3",
        metadata={
            "help": "Student: teacher-LAYERS (that many of the teacher's blocks, evenly spread), a size as "
            "bert-LAYERS-HIDDEN or a config.json (randomly initialised), or a model's folder or OWNER/NAME of the Hub "
            "(its weights are the start, and its tokenizer must be the teacher's)."
        },
    )

    def __post_init__(self):
        if self.dataset is None or self.teacher is None:
            raise ValueError("No data set or no teacher is given; name them with --dataset and --teacher.")
        if self.heldout_sentences <= NEIGHBOURS or self.max_length < 3:
            raise ValueError(
                f"heldout_sentences is {self.heldout_sentences} and max_length {self.max_length}; {NEIGHBOURS} "
                "neighbours need more sentences than that, and two special tokens and one of text need a length of 3."
            )


@dataclass
class TrainingConfig(RecipeConfig):
    """The recipes' configuration with this job's defaults: teacher and students have one basis."""

    output_dir: str | None = "runs/embeddings"
    pooling: str | None = "mean"
    projection: str = "identity"
    standardize_targets: bool = False
    max_steps: int = 1000
    train_sampling_strategy: str = "group_by_length"
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_steps: float = 0.1
    save_total_limit: int | None = 1
    disable_tqdm: bool | None = True


TASK = "Embeddings"  # for `hf-curriculum-distill plan embeddings`
NEIGHBOURS = 10
MIN_WORDS = 5  # shorter lines are titles
COLUMNS = ("student", "method", "seed", "cosine", "neighbours", "cosine before", "neighbours before", "seconds")


@errors_in_one_line()
def main():
    recipe, args = parse_arguments([RecipeArguments, TrainingConfig], description=__doc__.split("\n")[0])
    log_progress(logger, args)
    runs = planned_or_exit(recipe, args)
    for run in runs:
        check_run(run)
    train_all(runs, distil, args)
    if args.should_save:
        print(f"\n{as_table(read_results([args.output_dir]))}")


def check_run(run: Run) -> None:
    """Check models, vocabulary and steps before the data are read."""
    recipe = run.recipe
    if run.args.pooling in (None, "pooler"):
        raise ValueError(f"pooling is {run.args.pooling!r}; this recipe pools tokens: use 'mean', 'cls' or 'last'.")
    kwargs = run.args.teacher_model_init_kwargs
    teacher, tokenizer = find_config(recipe.teacher, where=file_arguments(kwargs)), find_tokenizer(recipe, kwargs)
    check_embeddings(recipe.student, recipe.student_embeddings, run.args, teacher)
    check_student_tokenizer(recipe.student, tokenizer)
    configs = find_config(recipe.student, teacher=teacher, vocab_size=len(tokenizer)), teacher
    with torch.device("meta"):
        models = [AutoModel.from_config(config) for config in configs]
    check_models(run.args, *models, tokenizer, ("max_length", recipe.max_length))


def distil(run: Run) -> dict[str, Any]:
    """Train one student, and compare its embeddings with the teacher's before and after."""
    recipe, kwargs = run.recipe, run.args.teacher_model_init_kwargs or {}
    args = replace(run.args, teacher_model_init_kwargs=None)
    set_seed(args.seed)
    tokenizer, teacher = find_tokenizer(recipe, kwargs), AutoModel.from_pretrained(recipe.teacher, **kwargs)
    student = start_embeddings(find_student(recipe.student, teacher, len(tokenizer)), teacher, run, tokenizer)
    train, heldout = (
        encode(Dataset.from_dict({"text": sentences}), "text", tokenizer, recipe.max_length)
        for sentences in read_sentences(recipe, num_examples(args, args.max_steps), args.seed)
    )
    shortest_first = sorted(range(len(heldout)), key=lambda index: len(heldout[index]["input_ids"]))
    heldout, collator = heldout.select(shortest_first), DataCollatorWithPadding(tokenizer)
    trainer = CurriculumDistillationTrainer(
        model=student,
        args=args,
        data_collator=collator,
        train_dataset=train,
        eval_dataset=heldout,
        processing_class=tokenizer,
        teacher_model=teacher,
    )
    trainer.remove_callback(PrinterCallback)
    loader = DataLoader(heldout, args.per_device_eval_batch_size, collate_fn=collator)
    of_teacher = embed(teacher, loader, args.pooling)

    def compare() -> dict[str, float]:
        bank, ours = trainer.projection_bank, embed(student, loader, args.pooling)
        found = {"neighbours": overlap(ours, of_teacher)}
        if bank is None or not bank.lacks_matrices:  # those of a PCA are measured when training begins
            target = of_teacher if bank is None else bank.project_output(of_teacher)
            found["cosine"] = torch.cosine_similarity(ours, target).mean().item()
        return found

    before = {f"{name} before": value for name, value in compare().items()}
    result = train_student(trainer, run.method) | before | {"student": recipe.student}
    return result | compare() if result["finite"] else result


def find_tokenizer(recipe: RecipeArguments, kwargs: dict | None) -> PreTrainedTokenizerBase:
    """The teacher's; `kwargs` are those that the teacher is loaded with."""
    return AutoTokenizer.from_pretrained(recipe.teacher, **file_arguments(kwargs, of_tokenizer=True))


def find_student(name: str, teacher: PreTrainedModel, vocabulary: int) -> PreTrainedModel:
    """Some of the teacher's layers, a size or a config.json, randomly initialised, or a model's weights."""
    if student_size(name) is not None:
        return make_student(name, teacher).float()
    if is_config_only(name):
        return AutoModel.from_config(find_config(name, vocab_size=vocabulary))
    return AutoModel.from_pretrained(name, dtype=torch.float32)


def read_sentences(recipe: RecipeArguments, number: int, seed: int) -> tuple[list[str], list[str]]:
    """Different sentences to train on, `number` of them at most, and those held out, which no seed changes."""
    splits = read_dataset(recipe.dataset, recipe.dataset_config)
    column = find_column(recipe.dataset, splits["train"].features, "text_column", recipe.text_column)
    if "validation" not in splits:
        size = num_held_out(recipe.dataset, len(splits["train"]), "validation")
        splits["train"], splits["validation"] = splits["train"].train_test_split(test_size=size, seed=0).values()
    parts = []
    for split, count, draw in (("train", number, seed), ("validation", recipe.heldout_sentences, 0)):
        drawn = dict.fromkeys(draw_sentences(splits[split], column, 3 * count, draw))
        kept = [sentence for sentence in drawn if len(sentence.split()) >= MIN_WORDS][:count]
        if len(kept) <= NEIGHBOURS:
            raise ValueError(f"The {split} texts of {recipe.dataset} have {len(kept)} sentences; give more of them.")
        parts.append(kept)
    return parts[0], parts[1]


@torch.no_grad()
def embed(model: PreTrainedModel, loader: DataLoader, pooling: str) -> Tensor:
    """The embeddings of all sentences, `[sentences, hidden]`."""
    training, model = model.training, model.eval()
    vectors = [pooled(pooling, model(**batch).last_hidden_state, batch["attention_mask"]) for batch in
               (batch.to(model.device) for batch in loader)]  # fmt: skip
    model.train(training)
    return torch.cat(vectors)


def overlap(ours: Tensor, theirs: Tensor, number: int = NEIGHBOURS) -> float:
    """The share of each row's nearest neighbours by cosine in `theirs` that are among those in `ours`."""
    nearest = []
    for vectors in (ours, theirs):
        unit = torch.nn.functional.normalize(vectors.float(), dim=-1)
        nearest.append((unit @ unit.T).fill_diagonal_(-2.0).topk(number, -1).indices)
    return (nearest[0][:, :, None] == nearest[1][:, None, :]).any(-1).float().mean().item()


def as_table(results: Sequence[dict[str, Any]]) -> str:
    """A line for each student, as Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    for result in results:
        lines.append([f"{v:.4g}" if isinstance(v := result.get(name), float) else str(v) for name in COLUMNS])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
