"""Sparse parity: a teacher that found the hidden coordinates, and students that learn from it by several methods.

Teacher, three methods, three seeds each, (50, 6)-parity, two CPU cores, under 2 minutes:
    accelerate launch --cpu recipes/sparse_parity.py --config recipes/configs/sparse_parity/demo.yaml
Then a plot:
    hf-curriculum-distill compare runs/sparse_parity/demo --threshold 0.99

The label is the parity of `sparsity` of `dimension` random bits. The loss of a network of finite width stays the same
for a long time and then falls in a short transition. Every example is fresh; the teacher is trained on labels alone
until it is right on --teacher_accuracy of held-out examples and some way beyond, and is kept for the next launch.

With --dimensions or --sparsities, how many examples each method needs for 0.99 as the task grows; a launch that was
stopped goes on where scaling.json ends:
    python recipes/sparse_parity.py --config recipes/configs/sparse_parity/scaling_dimension.yaml
"""

import itertools
import json
import logging
import os
from dataclasses import dataclass, field, replace

from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerState,
    set_seed,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils.logging import disable_progress_bar

from hf_curriculum_distill import CurriculumDistillationTrainer
from hf_curriculum_distill.files import write_files
from hf_curriculum_distill.lines import errors_in_one_line
from hf_curriculum_distill.options import ComparisonOptions, RecipeConfig
from hf_curriculum_distill.parsing import parse_arguments
from hf_curriculum_distill.report.checks import check_steps
from hf_curriculum_distill.report.launch import Run, plan_runs, planned_or_exit
from hf_curriculum_distill.report.runs import (
    check_kept_teacher,
    compare_methods,
    log_progress,
    num_examples,
    teacher_arguments,
    train_student,
)
from hf_curriculum_distill.report.scaling import RESULTS_FILE, SCALING_PLOT, budgets, format_scaling, plot_scaling
from hf_curriculum_distill.tasks.parity import (
    ParityMLPConfig,
    ParityMLPForSequenceClassification,
    SparseParity,
    draw_support,
    stack,
)

logger = logging.getLogger("sparse_parity")

HELDOUT_SEED, TEACHER_SEED = 2**40, 2**41  # no student's seed draws the same examples
LEARNT = 0.99  # held-out accuracy


@dataclass
class RecipeArguments(ComparisonOptions):
    dimension: int = field(default=50, metadata={"help": "Bits of an example."})
    sparsity: int = field(default=6, metadata={"help": "Bits whose parity is the label."})
    support: list[int] | None = field(default=None, metadata={"help": "Those bits, counted from 0; drawn by default."})
    support_seed: int = field(default=0, metadata={"help": "Seed that draws the support."})
    model: str = field(
        default="mlp", metadata={"help": "'mlp' (one hidden layer) or 'transformer' (GPT-2 that reads bits as tokens)."}
    )
    teacher_width: int = field(default=1000, metadata={"help": "The teacher's hidden size."})
    student_width: int = field(default=100, metadata={"help": "The student's hidden size."})
    num_layers: int = field(default=1, metadata={"help": "Blocks of teacher and student."})
    head_dim: int = field(default=8, metadata={"help": "Width of a transformer's attention heads."})
    initializer_range: float = field(default=0.02, metadata={"help": "Deviation of a transformer's initial weights."})
    teacher: str = field(
        default="runs/sparse_parity/teacher", metadata={"help": "The teacher's folder: used if trained, else written."}
    )
    teacher_max_samples: int = field(default=30_000_000, metadata={"help": "Examples after which the teacher failed."})
    teacher_save_samples: int = field(default=100_000, metadata={"help": "Examples between its checkpoints."})
    teacher_accuracy: float = field(default=0.995, metadata={"help": "Held-out accuracy at which it is trained."})
    teacher_finish_samples: int = field(
        default=500_000,
        metadata={"help": "Examples it goes on with after that: right after the transition its logits tell more."},
    )
    teacher_batch_size: int = field(default=64, metadata={"help": "Examples a step of the teacher's training."})
    first_checkpoint: str = field(
        default="transition",
        metadata={"help": "With method 'progressive', who teaches before the last: 'transition' or 'untrained'."},
    )
    shuffle_features: bool = field(
        default=False, metadata={"help": "Whether hidden states are matched with those of another example (a control)."}
    )
    heldout_examples: int = field(default=4096, metadata={"help": "Examples of every evaluation."})
    dimensions: list[int] | None = field(
        default=None, metadata={"help": "Search the examples to 0.99 for each of these, in place of --dimension."}
    )
    sparsities: list[int] | None = field(default=None, metadata={"help": "Likewise, in place of --sparsity."})
    smallest_budget: int = field(
        default=3200,
        metadata={"help": "Examples of the first training of such a search; the last has --max_steps."},
    )

    def __post_init__(self):
        if self.dimensions is not None and self.sparsities is not None:
            raise ValueError("Both dimensions and sparsities are given; let one of them grow.")
        if self.support is None:
            self.support = draw_support(self.dimension, self.sparsity, self.support_seed)
        if self.model not in ("mlp", "transformer"):
            raise ValueError(f"model is {self.model!r}; use 'mlp' or 'transformer'.")
        if self.first_checkpoint not in ("transition", "untrained"):
            raise ValueError(f"first_checkpoint is {self.first_checkpoint!r}; use 'transition' or 'untrained'.")
        if self.shuffle_features and self.model != "mlp":
            raise ValueError("shuffle_features is there for model 'mlp' only; leave it out.")
        if len(self.support) != self.sparsity:
            raise ValueError(
                f"support names {len(self.support)} bits, but sparsity is {self.sparsity}; make them equal."
            )


@dataclass
class TrainingConfig(RecipeConfig):
    """The recipes' configuration with this job's defaults, and the paper's curriculum."""

    layer_order: str = "sequential"
    hidden_weight_in_logit_stage: float = 0.0
    shared_projection: bool = False
    output_dir: str | None = "runs/sparse_parity/run"
    max_steps: int = 3125
    per_device_train_batch_size: int = 64
    per_device_eval_batch_size: int = 4096
    learning_rate: float = 0.5
    teacher_learning_rate: float | None = 0.5
    optim: str = "sgd"
    max_grad_norm: float = 0.0
    restart_schedule_per_stage: bool = True
    stage_warmup_ratio: float = 0.0
    layer_stage_fraction: float = 0.25
    calibration_samples: int = 4096
    bf16: bool = False
    save_strategy: str = "no"
    remove_unused_columns: bool | None = False
    disable_tqdm: bool | None = True


@errors_in_one_line()
def main():
    recipe, args = parse_arguments([RecipeArguments, TrainingConfig], description=__doc__.split("\n")[0])
    if recipe.dimensions or recipe.sparsities:
        print(f"\n{search_samples(recipe, args)}")
        return
    for run in planned_or_exit(recipe, args):
        check_steps(run.args, run.recipe.num_layers, run.recipe.num_layers)
    summary = compare_methods(recipe, args, find_teacher, distil, logger, threshold=0.99)
    if args.should_save:
        print(f"\n{summary}")


def distil(run: Run, checkpoints: list[str], callbacks: list[TrainerCallback] | None = None) -> dict:
    """Train one student on fresh examples."""
    recipe, args = run.recipe, run.args
    teacher = checkpoints if args.method == "progressive" else checkpoints[-1]
    if args.method == "online":
        teacher = make_model(recipe, recipe.teacher_width)
    if recipe.shuffle_features:
        teacher = ShuffledFeatures.from_pretrained(checkpoints[-1])
    set_seed(args.seed)
    trainer = CurriculumDistillationTrainer(
        model=make_model(recipe, recipe.student_width),
        args=args,
        teacher_model=teacher,
        callbacks=callbacks,
        **data(recipe, num_examples(args, args.max_steps), args.seed),
    )
    trainer.remove_callback(PrinterCallback)
    return train_student(trainer, run.method)


# ---- how many examples a method needs ----


def search_samples(recipe: RecipeArguments, args: TrainingConfig) -> str:
    """Train each method on more and more examples until it has learnt each task; a table of what it took.

    A training at a constant rate and without layer stages is the beginning of a longer one, so that one is enough. Any
    other is done again for each budget. All that has ended is in scaling.json, and is not done again.
    """
    log_progress(logger, args)
    disable_progress_bar()
    path = os.path.join(args.output_dir, RESULTS_FILE)
    os.makedirs(args.output_dir, exist_ok=True)
    records = []
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            records = json.load(file)
    axis = 0 if recipe.dimensions else 1
    sizes = list(itertools.product(recipe.dimensions or [recipe.dimension], recipe.sparsities or [recipe.sparsity]))
    seeds = recipe.seeds or [args.seed]

    def keep(**record) -> None:
        records.append(record)
        write_files({path: json.dumps(records, indent=1).encode()})
        logger.info("%s", record)

    def ended(key: dict) -> bool:
        return any(key.items() <= record.items() and (record["reached"] or record["last"]) for record in records)

    for seed, (dimension, sparsity) in itertools.product(seeds, sizes):
        size = {"dimension": dimension, "sparsity": sparsity}
        place = f"d{dimension}-k{sparsity}"
        own = replace(recipe, **size, support=None, seeds=[seed], teacher=os.path.join(recipe.teacher, place))
        of_teacher = {**size, "method": "teacher", "seed": recipe.support_seed}
        if not ended(of_teacher):
            keep(**of_teacher, **cost_of_teacher(own, args))
        if not any(of_teacher.items() <= record.items() and record["reached"] for record in records):
            continue
        for run in plan_runs(own, replace(args, output_dir=os.path.join(args.output_dir, place))):
            key = {**size, "method": run.method, "seed": seed}
            if ended(key):
                continue
            steps = budgets(max(1, recipe.smallest_budget // num_examples(run.args, 1)), run.args.max_steps)
            checkpoints = find_teacher(own, args)
            callbacks = None
            if run.args.lr_scheduler_type == "constant" and run.args.method in ("labels", "one_shot"):
                callbacks, steps = [StopWhenLearnt(steps)], steps[-1:]
            for budget in steps:
                if any({**key, "budget": budget}.items() <= record.items() for record in records):
                    continue
                shorter = replace(run.args, max_steps=budget, eval_strategy="no")
                result = distil(replace(run, args=shorter), checkpoints, callbacks)
                accuracy = result.get("eval_accuracy", 0.0)
                facts = {"samples": result.get("samples", num_examples(shorter, budget)), "accuracy": accuracy}
                keep(**key, budget=budget, **facts, reached=accuracy >= LEARNT, last=budget == steps[-1])
                if accuracy >= LEARNT:
                    break
    plot_scaling(records, os.path.join(args.output_dir, SCALING_PLOT), axis)
    return format_scaling(records, len(seeds), axis)


def cost_of_teacher(recipe: RecipeArguments, args: TrainingConfig) -> dict:
    """Train the teacher unless it is there; the examples that it took until it had learnt the task."""
    try:
        find_teacher(recipe, args)
    except SystemExit as error:
        logger.info("%s", error)
        return {"samples": recipe.teacher_max_samples, "reached": False, "last": True}
    history = TrainerState.load_from_json(os.path.join(recipe.teacher, TRAINER_STATE_NAME)).log_history
    step = min(log["step"] for log in history if log.get("eval_accuracy", 0.0) >= LEARNT)
    return {"samples": step * recipe.teacher_batch_size, "reached": True, "last": False}


class StopWhenLearnt(TrainerCallback):
    """Evaluates at these steps, and ends training at the first evaluation that is good enough."""

    def __init__(self, steps: list[int]):
        self.steps = set(steps)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate |= state.global_step in self.steps

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        control.should_training_stop |= metrics["eval_accuracy"] >= LEARNT


# ---- the teacher ----


def find_teacher(recipe: RecipeArguments, args: TrainingConfig) -> list[str]:
    """Two checkpoints of the teacher, which is trained if it is not there yet: --first_checkpoint and the last."""
    logger.info("(%d, %d)-parity of bits %s", recipe.dimension, recipe.sparsity, recipe.support)
    state = os.path.join(recipe.teacher, TRAINER_STATE_NAME)
    if not os.path.isfile(state):
        train_teacher(recipe, args)
    wanted = make_model(recipe, recipe.teacher_width).config
    there = type(wanted).from_pretrained(recipe.teacher)
    names = ("support", "input_size", "n_positions", "hidden_size", "num_hidden_layers", "num_attention_heads")
    check_kept_teacher(recipe.teacher, {n: (getattr(there, n, None), getattr(wanted, n, None)) for n in names})
    history = TrainerState.load_from_json(state).log_history
    accuracy = {log["step"]: log["eval_accuracy"] for log in history if "eval_accuracy" in log}
    logger.info("Teacher: held-out accuracy %.4f at step %d", accuracy[max(accuracy)], max(accuracy))
    first = 0
    if recipe.first_checkpoint == "transition":
        first = min(accuracy, key=lambda step: abs(accuracy[step] - 0.75))
        logger.info("Inside its transition: %.4f at step %d", accuracy[first], first)
    return [os.path.join(recipe.teacher, f"checkpoint-{step}") for step in (first, max(accuracy))]


def train_teacher(recipe: RecipeArguments, args: TrainingConfig) -> None:
    """Train on labels until --teacher_accuracy, with a checkpoint every --teacher_save_samples."""
    batch = recipe.teacher_batch_size
    max_steps, every = recipe.teacher_max_samples // batch, max(1, recipe.teacher_save_samples // batch)
    logger.info("%s: training a teacher on labels", recipe.teacher)
    set_seed(recipe.support_seed)
    trainer = CurriculumDistillationTrainer(
        model=make_model(recipe, recipe.teacher_width),
        args=teacher_arguments(args, recipe.teacher, max_steps, batch, every, lr_scheduler_type="constant"),
        callbacks=[StopWhenTrained(recipe.teacher_accuracy, recipe.teacher_finish_samples // batch)],
        **data(recipe, recipe.teacher_max_samples, TEACHER_SEED + recipe.support_seed),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.save_model(os.path.join(recipe.teacher, "checkpoint-0"))
    trainer.train()
    accuracy = trainer.evaluate()["eval_accuracy"]
    if accuracy < recipe.teacher_accuracy:
        raise SystemExit(
            f"The teacher's held-out accuracy is {accuracy:.4f} after {recipe.teacher_max_samples:,} examples, below "
            f"{recipe.teacher_accuracy}; raise --teacher_max_samples or change --teacher_learning_rate."
        )
    trainer.save_model()
    trainer.save_state()


class ShuffledFeatures(ParityMLPForSequenceClassification):
    """Right logits, but the hidden states on the way belong to the example before."""

    def forward(self, inputs, labels=None):
        logits = super().forward(inputs.roll(1, 0)).logits.roll(-1, 0)
        return SequenceClassifierOutput(logits=logits)


class StopWhenTrained(TrainerCallback):
    """Ends training, with a checkpoint, `num_more_steps` after the first evaluation that is good enough."""

    def __init__(self, accuracy: float, num_more_steps: int):
        self.accuracy, self.num_more_steps, self.end = accuracy, num_more_steps, None

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        logger.info("step %d: held-out accuracy %.4f", state.global_step, metrics["eval_accuracy"])
        if self.end is None and metrics["eval_accuracy"] >= self.accuracy:
            self.end = state.global_step + self.num_more_steps
        if self.end is not None and state.global_step >= self.end:
            control.should_training_stop = control.should_save = True


def make_model(recipe: RecipeArguments, width: int) -> PreTrainedModel:
    if recipe.model == "mlp":
        sizes = {"input_size": recipe.dimension, "hidden_size": width, "num_hidden_layers": recipe.num_layers}
        return ParityMLPForSequenceClassification(ParityMLPConfig(**sizes, support=recipe.support))
    config = GPT2Config(
        vocab_size=2,
        n_positions=recipe.dimension + 1,
        n_embd=width,
        n_layer=recipe.num_layers,
        n_head=width // recipe.head_dim,
        initializer_range=recipe.initializer_range,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        support=recipe.support,
    )
    return GPT2LMHeadModel(config)


def data(recipe: RecipeArguments, num_train: int, seed: int) -> dict:
    """Fresh training examples and the held-out ones, as the Trainer's arguments."""
    task = {"dimension": recipe.dimension, "support": recipe.support, "as_tokens": recipe.model == "transformer"}
    return {
        "train_dataset": SparseParity(num_train, seed=seed, **task),
        "eval_dataset": SparseParity(recipe.heldout_examples, seed=HELDOUT_SEED, **task),
        "data_collator": stack,
    }


if __name__ == "__main__":
    main()
