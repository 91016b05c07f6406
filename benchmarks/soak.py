"""Thousands of tiny steps, and what they leave behind: memory, tensors, objects, open files, hooks, checkpoints.

    python benchmarks/soak.py --steps 5000               # about 4 minutes on an idle CPU core
    python benchmarks/soak.py --steps 20000 --methods curriculum

A round is a plan with every kind of stage; a run goes through it again and again while it logs, evaluates and saves.
In the first rounds every parameter gets its optimizer state and every cache its content; from there on, what is held at
the end of a round should be what was held a round before. By design grow the training log, and the totals by what a
stage costs: four numbers a stage. `stock` is `transformers.Trainer` itself, which keeps a few objects an evaluation.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil
import torch
import transformers
from stage_cost import machine
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, HfArgumentParser, PrinterCallback, TrainerCallback, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_curriculum_distill import CurriculumDistillationConfig, CurriculumDistillationTrainer

METHODS = ("stock", "curriculum", "progressive", "online")
ROUND = (
    {"hidden": [[1, 2]]},  # layer by layer
    {"hidden": [[2, 4]]},
    {"hidden": [[1, 2], [2, 4]]},  # together
    {"kl_weight": 1.0},
    {"kl_weight": 1.0, "hidden": [[2, 4]], "label_weight": 0.5},
    {"label_weight": 1.0},
)
VOCAB_SIZE, LENGTH, EXAMPLES, BATCH_SIZE = 40, 8, 20, 2


@dataclass
class Options:
    steps: int = field(default=5000, metadata={"help": "Optimizer steps of each run; a multiple of 10 times rounds."})
    rounds: int = field(default=10, metadata={"help": "How often a run goes through all stages."})
    every: int = field(default=50, metadata={"help": "Steps between checkpoints, of which two stay, and evaluations."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": f"Any of {' '.join(METHODS)}."})
    seed: int = field(default=0, metadata={"help": "Seed of models, data and runs."})

    def __post_init__(self):
        if self.steps < 1 or self.steps % (self.rounds * EXAMPLES // BATCH_SIZE):
            raise ValueError(
                f"steps is {self.steps}; a round has to end with an epoch ({EXAMPLES // BATCH_SIZE} steps) for rounds "
                f"to be comparable, so give a multiple of {self.rounds * EXAMPLES // BATCH_SIZE}."
            )


@dataclass
class Held:
    """What the process and the run hold at one moment."""

    step: int
    mib: float  # resident memory
    tensors: int  # of the run, that Python can reach
    in_cycles: int  # tensors among what only the garbage collector freed: on a GPU they would hold memory until it runs
    objects: int  # of the run that can refer to others
    files: int  # open
    hooks: int  # on modules of the student and the teacher, and replaced forwards
    checkpoints: int  # folders, an online teacher's included
    totals: int  # numbers in the run's totals
    state: int  # values in the Trainer's state, the log aside
    log: int  # entries of the log


def measure(trainer: CurriculumDistillationTrainer) -> Held:
    uncollected = len(live_tensors())
    gc.collect()
    state = dict(vars(trainer.state))
    log, tensors = state.pop("log_history"), len(live_tensors())
    models = [trainer.model, *([trainer.teacher.model] if trainer.teacher else [])]
    folders = [name for _, folders, _ in os.walk(trainer.args.output_dir) for name in folders]
    return Held(
        step=trainer.state.global_step,
        mib=psutil.Process().memory_info().rss / 2**20,
        tensors=tensors,
        in_cycles=uncollected - tensors,
        objects=len(gc.get_objects()),
        files=count_files(),
        hooks=sum(count_hooks(module) for model in models for module in model.modules()),
        checkpoints=sum(name.startswith(PREFIX_CHECKPOINT_DIR) for name in folders),
        totals=count_values(vars(trainer._totals)) if trainer.stages else 0,
        state=count_values(state),
        log=len(log),
    )


def live_tensors() -> list[Tensor]:
    return [o for o in gc.get_objects() if issubclass(type(o), Tensor)]  # isinstance would wake lazy modules


def count_files() -> int:
    process = psutil.Process()
    return process.num_handles() if os.name == "nt" else process.num_fds()


def count_hooks(module: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for kind in kinds) + ("forward" in vars(module))


def count_values(value) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(count_values, value)) if isinstance(value, (list, tuple, set)) else 1


class Probe(TrainerCallback):
    """Measures as the step after each round begins: whatever follows the round's last step is done."""

    def __init__(self, steps: set[int], measured: Callable[[], None]):
        self.steps, self.measured = steps, measured

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            self.measured()


def bert(depth: int, width: int) -> BertForMaskedLM:
    sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": depth, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=LENGTH, **sizes))


def masked_lm_examples() -> list[dict[str, Tensor]]:
    tokens = torch.randint(5, VOCAB_SIZE, (EXAMPLES, LENGTH))
    masked = torch.rand(EXAMPLES, LENGTH) < 0.3
    masked[:, 0] = True
    inputs, labels = torch.where(masked, 4, tokens), torch.where(masked, tokens, -100)
    return [{"input_ids": ids, "labels": targets} for ids, targets in zip(inputs, labels, strict=True)]


def plan(options: Options) -> list[dict]:
    """The stages of all rounds, each as long as the others to within a step."""
    count = options.rounds * len(ROUND)
    ends = [options.steps * index // count for index in range(1, count)]
    return [stage | {"until": end} for stage, end in zip(ROUND * options.rounds, [*ends, None], strict=True)]


def soak(
    options: Options, method: str, folder: str, show: Callable[[Held], None] = lambda held: None
) -> tuple[CurriculumDistillationTrainer, list[Held]]:
    """Train once; returns the trainer and what was held before, at the end of each round but the last, and after."""
    gc.collect()
    gc.freeze()  # what is there already is not counted
    set_seed(options.seed)
    student, teacher, examples = bert(2, 8), bert(4, 12), masked_lm_examples()
    if method == "progressive":
        checkpoints = [os.path.join(folder, "teacher", f"{PREFIX_CHECKPOINT_DIR}-{step}") for step in (1, 2)]
        for checkpoint in checkpoints:
            bert(4, 12).save_pretrained(checkpoint)
        teacher = os.path.dirname(checkpoint)
    distils = {"method": method, "stages": plan(options), "standardize_targets": method != "online"}
    args = CurriculumDistillationConfig(
        os.path.join(folder, "student"),
        teacher_schedule="fraction",
        max_steps=options.steps,
        per_device_train_batch_size=BATCH_SIZE,
        logging_steps=5,
        save_strategy="steps",
        save_steps=options.every,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=options.every,
        seed=options.seed,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **({} if method == "stock" else distils),
    )
    length = options.steps // options.rounds
    held: list[Held] = []
    probe = Probe(set(range(length, options.steps, length)), lambda: held.append(measure(trainer)) or show(held[-1]))
    trainer = CurriculumDistillationTrainer(
        student,
        args,
        train_dataset=examples,
        eval_dataset=examples[:8],
        teacher_model=None if method == "stock" else teacher,
        callbacks=[probe],
    )
    trainer.remove_callback(PrinterCallback)
    collects = gc.isenabled()
    gc.disable()  # so that what only it can free is there to be counted
    try:
        probe.measured()
        trainer.train()
        probe.measured()
    finally:
        gc.unfreeze()
        if collects:
            gc.enable()
    return trainer, held


def main() -> None:
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    print(f"{machine(CurriculumDistillationConfig(use_cpu=True))}; seed {options.seed}, {options.rounds} rounds")
    names = [field.name for field in dataclasses.fields(Held)]
    for method in options.methods:
        print(f"\n{method}\n" + "".join(f"{name:>12}" for name in names))
        with tempfile.TemporaryDirectory() as folder:
            soak(options, method, folder, show)


def show(held: Held) -> None:
    values = dataclasses.astuple(held)
    print("".join(f"{v:12.1f}" if isinstance(v, float) else f"{v:12}" for v in values), flush=True)


if __name__ == "__main__":
    main()
