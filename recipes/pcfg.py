"""Grammar: a masked language model that learnt to parse, and students that learn from it by several methods.

Teacher, five ways to learn, three seeds each, sentences of 22 letters, one CPU core, about 10 minutes:
    accelerate launch --cpu recipes/pcfg.py --config recipes/configs/pcfg/demo.yaml
What comes out: results.json and a table; again, with a plot, by `hf-curriculum-distill compare runs/pcfg/demo`.

Sentences of a context-free grammar (see hf_curriculum_distill/tasks/pcfg.py), of whose letters 30 % are masked. Every
seed draws as many sentences as its training takes, unless --train_sentences has it go through fewer of them in epochs.
The teacher learns from labels and is kept for the next launch; its checkpoints teach the progressive method. Two sets
are held out, each masked once: settings are chosen with --evaluate_on validation and reported with --evaluate_on test.
Nothing that is trained sees a sentence of either.
"""

import logging
import os
from dataclasses import dataclass, field, replace

import pyarrow
import pyarrow.compute
from datasets import Dataset
from transformers import BertConfig, BertForMaskedLM, PrinterCallback, TrainerCallback, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from hf_curriculum_distill import CurriculumDistillationTrainer
from hf_curriculum_distill.lines import errors_in_one_line
from hf_curriculum_distill.options import ComparisonOptions, RecipeConfig
from hf_curriculum_distill.parsing import parse_arguments
from hf_curriculum_distill.report.checks import check_steps
from hf_curriculum_distill.report.launch import Run, planned_or_exit
from hf_curriculum_distill.report.runs import (
    LABELS_ALONE,
    check_kept_teacher,
    compare_methods,
    num_examples,
    teacher_arguments,
    train_student,
)
from hf_curriculum_distill.tasks.pcfg import GRAMMARS, LETTER_IDS, Grammar, pcfg_dataset, pcfg_tokenizer
from hf_curriculum_distill.tasks.text import MaskedBlocksCollator, mask_once

logger = logging.getLogger("pcfg")

# No student's seed draws the same sentences.
HELDOUT_SEEDS = {"validation": 2**40, "test": 2**40 + 1}
TEACHER_SEED = 2**41


@dataclass
class RecipeArguments(ComparisonOptions):
    grammar: str = field(default="cfg3b", metadata={"help": f"One of {', '.join(GRAMMARS)}."})
    start: int | None = field(default=None, metadata={"help": "Symbol that becomes a sentence; the grammar's first."})
    max_length: int = field(default=512, metadata={"help": "Letters after which a sentence is cut."})
    num_layers: int = field(default=4, metadata={"help": "Blocks of teacher and student."})
    head_dim: int = field(default=8, metadata={"help": "Width of an attention head."})
    teacher_heads: int = field(
        default=32, metadata={"help": "The teacher's heads; its hidden size is theirs together."}
    )
    student_heads: int = field(default=8, metadata={"help": "The student's heads; likewise."})
    mlm_probability: float = field(default=0.3, metadata={"help": "Share of the letters that is masked."})
    train_sentences: int | None = field(
        default=None, metadata={"help": "Sentences of a training, in epochs; as many as its steps take by default."}
    )
    heldout_sentences: int = field(default=4096, metadata={"help": "Sentences of every evaluation."})
    evaluate_on: str = field(
        default="test", metadata={"help": "Held-out set: 'validation', to choose settings, or 'test', to report."}
    )
    teacher: str = field(
        default="runs/pcfg/teacher", metadata={"help": "The teacher's folder: used if trained, else written."}
    )
    teacher_steps: int = field(default=16_000, metadata={"help": "Steps of the teacher's training, on the labels."})
    teacher_save_steps: int = field(default=1000, metadata={"help": "Steps between its checkpoints."})
    teacher_batch_size: int = field(default=512, metadata={"help": "Sentences a step of that training."})
    teacher_seed: int = field(default=0, metadata={"help": "Seed of that training and its sentences."})
    earlier_teachers: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Steps of the checkpoints (0: untrained) that teach before the last, if teacher_schedule is a list."
        },
    )

    def __post_init__(self):
        if self.grammar not in GRAMMARS:
            raise ValueError(f"grammar is {self.grammar!r}; use one of {', '.join(GRAMMARS)}.")
        if self.evaluate_on not in HELDOUT_SEEDS:
            raise ValueError(f"evaluate_on is {self.evaluate_on!r}; use 'validation' or 'test'.")
        if self.teacher_steps % self.teacher_save_steps:
            raise ValueError(
                f"teacher_steps is {self.teacher_steps}, no multiple of teacher_save_steps, {self.teacher_save_steps}; "
                "the last checkpoint must be the trained teacher."
            )
        if self.start is None:
            self.start = GRAMMARS[self.grammar].start
        _ = self.sentences_of  # raises

    @property
    def sentences_of(self) -> Grammar:
        return GRAMMARS[self.grammar].started_at(self.start)


@dataclass
class TrainingConfig(RecipeConfig):
    """The recipes' configuration with this job's defaults, and the paper's curriculum."""

    layer_order: str = "sequential"
    hidden_weight_in_logit_stage: float = 0.0
    shared_projection: bool = False
    output_dir: str | None = "runs/pcfg/run"
    max_steps: int = 4000
    per_device_train_batch_size: int = 512
    per_device_eval_batch_size: int = 512
    learning_rate: float = 5e-3
    teacher_learning_rate: float | None = 5e-3
    adam_beta2: float = 0.95
    warmup_steps: float = 0.06
    bf16: bool = False
    save_strategy: str = "no"
    disable_tqdm: bool | None = True


@errors_in_one_line()
def main():
    recipe, args = parse_arguments([RecipeArguments, TrainingConfig], description=__doc__.split("\n")[0])
    for run in planned_or_exit(recipe, args):
        check_steps(run.args, run.recipe.num_layers, run.recipe.num_layers)
    summary = compare_methods(recipe, args, find_teacher, distil, logger)
    if args.should_save:
        print(f"\n{summary}")


def distil(run: Run, teacher: str) -> dict:
    """Train one student on its seed's sentences."""
    recipe, args = run.recipe, run.args
    set_seed(args.seed)
    trainer = CurriculumDistillationTrainer(
        model=make_model(recipe, recipe.student_heads),
        args=args,
        teacher_model=who_teaches(recipe, teacher, args),
        **data(recipe, recipe.evaluate_on, recipe.train_sentences or num_examples(args, args.max_steps), args.seed),
    )
    trainer.remove_callback(PrinterCallback)
    return train_student(trainer, run.method)


def who_teaches(recipe: RecipeArguments, teacher: str, args: TrainingConfig) -> str | list[str] | BertForMaskedLM:
    """The trained teacher; for `progressive` all its checkpoints or a few, for `online` one that is yet to learn."""
    if args.method == "online":
        return make_model(recipe, recipe.teacher_heads)
    if args.method == "progressive" and isinstance(args.teacher_schedule, list):
        steps = [*recipe.earlier_teachers, recipe.teacher_steps]
        return [os.path.join(teacher, f"checkpoint-{step}") for step in steps]
    return teacher


def find_teacher(recipe: RecipeArguments, args: TrainingConfig) -> str:
    """The teacher's folder, after training it if it is not there yet; logs how good it is."""
    logger.info(
        "%s from %d on: sentences of %.0f letters on average",
        recipe.grammar, recipe.start, recipe.sentences_of.mean_length(),
    )  # fmt: skip
    set_seed(recipe.teacher_seed)
    model = make_model(recipe, recipe.teacher_heads)
    state = os.path.join(recipe.teacher, TRAINER_STATE_NAME)
    if not os.path.isfile(state):
        train_teacher(recipe, args, model)
    steps = TrainerState.load_from_json(state).global_step
    there = BertConfig.from_pretrained(recipe.teacher).to_dict() | {"steps": steps}
    wanted = model.config.to_dict() | {"steps": recipe.teacher_steps}
    names = ("grammar", "start", "hidden_size", "num_hidden_layers", "num_attention_heads", "steps")
    check_kept_teacher(recipe.teacher, {name: (there.get(name), wanted[name]) for name in names})
    trainer = CurriculumDistillationTrainer(
        model=BertForMaskedLM.from_pretrained(recipe.teacher),
        args=replace(args, output_dir=recipe.teacher, eval_strategy="no", **LABELS_ALONE),
        **data(recipe, recipe.evaluate_on),
    )
    trainer.remove_callback(PrinterCallback)
    accuracy = trainer.evaluate()["eval_accuracy"]
    logger.info("Teacher: masked top-1 %.4f on the %s set", accuracy, recipe.evaluate_on)
    return recipe.teacher


def train_teacher(recipe: RecipeArguments, args: TrainingConfig, model: BertForMaskedLM) -> None:
    """Train on the labels of fresh sentences, with a checkpoint before it and every --teacher_save_steps."""
    teacher_args = teacher_arguments(
        args,
        recipe.teacher,
        recipe.teacher_steps,
        recipe.teacher_batch_size,
        recipe.teacher_save_steps,
        seed=recipe.teacher_seed,
        save_total_limit=None,
    )
    logger.info("%s: training a teacher on labels", recipe.teacher)
    num_train, seed = num_examples(teacher_args, recipe.teacher_steps), TEACHER_SEED + recipe.teacher_seed
    trainer = CurriculumDistillationTrainer(
        model=model,
        args=teacher_args,
        callbacks=[SayAccuracy()],
        **data(recipe, "validation", num_train, seed),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.save_model(os.path.join(recipe.teacher, "checkpoint-0"))
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    trainer.accelerator.wait_for_everyone()


class SayAccuracy(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics, **kwargs):
        logger.info("step %d: masked top-1 %.4f on the validation set", state.global_step, metrics["eval_accuracy"])


def make_model(recipe: RecipeArguments, num_heads: int) -> BertForMaskedLM:
    hidden_size = num_heads * recipe.head_dim
    tokenizer = pcfg_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=num_heads,
        max_position_embeddings=recipe.max_length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        grammar=recipe.grammar,
        start=recipe.start,
    )
    return BertForMaskedLM(config)


def data(recipe: RecipeArguments, heldout: str, num_train: int | None = None, seed: int = 0) -> dict:
    """Held-out sentences, masked once, and training sentences, masked anew each time, as the Trainer's arguments."""
    tokenizer, grammar, max_length = pcfg_tokenizer(), recipe.sentences_of, recipe.max_length
    test, validation = (
        pcfg_dataset(grammar, recipe.heldout_sentences, HELDOUT_SEEDS[name], max_length)
        for name in ("test", "validation")
    )
    held_out, train = test if heldout == "test" else without(validation, test), None
    if num_train is not None:
        train = without(pcfg_dataset(grammar, num_train, seed, max_length), test, validation)
        if not len(train):
            raise SystemExit("No sentence is left to train on; lower --heldout_sentences or take a larger grammar.")
        if dropped := num_train - len(train):
            logger.info("%d of %d training sentences are held out and left out", dropped, num_train)
    return {
        "train_dataset": train,
        "eval_dataset": mask_once(held_out, tokenizer, recipe.mlm_probability, seed=0, random_ids=LETTER_IDS),
        "data_collator": MaskedBlocksCollator(tokenizer, recipe.mlm_probability, LETTER_IDS),
        "processing_class": tokenizer,
    }


def without(sentences: Dataset, *others: Dataset) -> Dataset:
    """The sentences that are in none of the others; small grammars have few, and the same ones are drawn again."""
    known = pyarrow.concat_arrays([as_strings(chunk) for other in others for chunk in other.data["input_ids"].chunks])
    chunks = [as_strings(chunk) for chunk in sentences.data["input_ids"].chunks]
    is_known = pyarrow.compute.is_in(pyarrow.chunked_array(chunks), value_set=known).to_numpy()
    return sentences if not is_known.any() else sentences.select((~is_known).nonzero()[0])


def as_strings(letters: pyarrow.ListArray) -> pyarrow.BinaryArray:
    """The same bytes, seen as one string a sentence."""
    _, offsets, _, ids = letters.buffers()
    return pyarrow.BinaryArray.from_buffers(pyarrow.binary(), len(letters), [None, offsets, ids], offset=letters.offset)


if __name__ == "__main__":
    main()
