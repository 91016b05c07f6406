"""What a step costs where the models cost next to nothing: this library, a bare loop, a plain `transformers.Trainer`.

    python benchmarks/small_model_overhead.py            # about 1 minute on an idle CPU core

Two-layer networks on sparse parity, as in recipes/sparse_parity.py: data, forward passes, loss, backward pass, SGD and
a cosine schedule. The bare loop is the floor: the same work written out in PyTorch. The plain Trainer is the same loss
in a `compute_loss` of its own: what of the difference is Trainer's. The three share weights and batches and take turns;
their losses must agree.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from stage_cost import machine
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import HfArgumentParser, PrinterCallback, Trainer, TrainerCallback, get_scheduler, set_seed

from hf_curriculum_distill import CurriculumDistillationConfig, CurriculumDistillationTrainer, ProjectionBank, Stage
from hf_curriculum_distill.tasks.parity import (
    ParityMLPConfig,
    ParityMLPForSequenceClassification,
    SparseParity,
    draw_support,
    stack,
)

TARGET = 3.0  # library / floor, both stages


@dataclass
class Options:
    dimension: int = field(default=50, metadata={"help": "Bits of an example."})
    sparsity: int = field(default=6, metadata={"help": "Bits whose parity is the label."})
    teacher_width: int = field(default=1000, metadata={"help": "The teacher's hidden size."})
    student_width: int = field(default=100, metadata={"help": "The student's hidden size."})
    batch_size: int = field(default=64, metadata={"help": "Examples a step."})
    steps: int = field(default=1000, metadata={"help": "Timed steps a turn."})
    repeats: int = field(default=5, metadata={"help": "Turns each way gets; times are medians over turns."})
    processor_time: bool = field(
        default=False, metadata={"help": "Time by what was computed; for machines that others use meanwhile."}
    )


class Probe(TrainerCallback):
    """Times a run between its first step's end and its last's, data included."""

    def __init__(self, clock: Callable[[], float]):
        self.clock = clock

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.start = self.clock()
        if state.global_step == args.max_steps:
            self.microseconds = 1e6 * (self.clock() - self.start) / (args.max_steps - 1)


class ByHand:
    """The stage's loss, written out."""

    def __init__(self, teacher, stage: Stage, bank: ProjectionBank):
        self.teacher, self.stage = teacher, stage
        weight, mean, std = (bank.tensors()[f"layer_1_1.{name}"] for name in ("weight", "mean", "std"))
        self.projection = weight / std[:, None], -mean / std

    def __call__(self, student, inputs: torch.Tensor) -> torch.Tensor:
        if self.stage.hidden:
            with torch.inference_mode():
                target = self.teacher.blocks[0](inputs)
            return F.mse_loss(student.blocks[0](inputs), F.linear(target, *self.projection))
        with torch.inference_mode():
            target = self.teacher(inputs).logits
        logits, target = (logits.log_softmax(-1) for logits in (student(inputs).logits, target))
        return F.kl_div(logits, target, reduction="batchmean", log_target=True)


class BareLoop:
    """The floor: what a stage needs, and nothing else."""

    def __init__(self, model, args, train_dataset, loss: ByHand, probe: Probe):
        self.student, self.args, self.dataset, self.loss, self.probe = model, args, train_dataset, loss, probe

    def train(self) -> float:
        args, total = self.args, 0.0
        self.student.train()
        optimizer = torch.optim.SGD(self.student.parameters(), lr=args.learning_rate)
        schedule = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=args.max_steps)
        for step, batch in enumerate(DataLoader(self.dataset, args.train_batch_size, collate_fn=stack), start=1):
            loss = self.loss(self.student, batch["inputs"])
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.detach()
            if step == 1:
                start = self.probe.clock()
        self.probe.microseconds = 1e6 * (self.probe.clock() - start) / (args.max_steps - 1)
        return total.item() / args.max_steps


class PlainTrainer(Trainer):
    """transformers' own loop around the same loss."""

    def __init__(self, *args, loss: ByHand, **kwargs):
        super().__init__(*args, **kwargs)
        self.by_hand = loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.by_hand(model, inputs["inputs"])


@dataclass
class Row:
    """One stage; microseconds in the order library, floor, plain Trainer."""

    stage: str
    microseconds: list[float]
    over_floor: float
    trainer_over_floor: float


def measure(stage: Stage, student, teacher, bank, dataset, args, repeats: int, clock, bar: tqdm) -> Row:
    args, by_hand = copy.copy(args), ByHand(teacher, stage, bank)
    args.stages = [vars(stage)]

    def turn(make) -> tuple[float, float]:
        """Mean loss, and microseconds a step, of one run from the same weights."""
        bar.set_description(f"{stage.name}: {make.__name__}")
        probe, given = Probe(clock), {"model": copy.deepcopy(student), "args": args, "train_dataset": dataset}
        if make is BareLoop:
            run = make(**given, loss=by_hand, probe=probe)
        else:
            given |= {"data_collator": stack, "callbacks": [probe]}
            if make is PlainTrainer:
                run = make(**given, loss=by_hand)
            else:
                own_bank = copy.deepcopy(bank) if stage.hidden else None
                run = make(**given, teacher_model=teacher, projection_bank=own_bank)
            run.remove_callback(PrinterCallback)
        result = run.train()
        bar.update()
        return result if isinstance(result, float) else result.training_loss, probe.microseconds

    turns = []
    for _ in range(repeats):
        losses, times = zip(*(turn(m) for m in (CurriculumDistillationTrainer, BareLoop, PlainTrainer)), strict=True)
        if max(losses) - min(losses) > 1e-3 * max(losses):
            raise RuntimeError(f"{stage.name}: the losses of library, floor and Trainer differ: {losses}")
        turns.append(times)
    library, floor, plain = np.median(turns, axis=0).tolist()
    return Row(
        stage=stage.name,
        microseconds=[library, floor, plain],
        over_floor=library / floor,
        trainer_over_floor=plain / floor,
    )


def build(options: Options, width: int) -> ParityMLPForSequenceClassification:
    return ParityMLPForSequenceClassification(ParityMLPConfig(input_size=options.dimension, hidden_size=width))


def report(rows: list[Row]) -> None:
    print(f"\n{'':10}|{'µs a step':^29}|{'over floor':^20}")
    print(f"{'stage':10}|{'library':>9}{'floor':>9}{'Trainer':>9}  |{'library':>9}{'Trainer':>9}")
    for row in rows:
        print(f"{row.stage:10}|" + "".join(f"{us:9.0f}" for us in row.microseconds), end="  |")
        print(f"{row.over_floor:9.2f}{row.trainer_over_floor:9.2f}")
    print(f"\n{'':48}{'target':>8}{'measured':>10}")
    for row in rows:
        missed = "" if row.over_floor <= TARGET else "  missed"
        print(f"{f'library / floor, time, {row.stage}':48}{'<=':>3}{TARGET:5.2f}{row.over_floor:10.2f}{missed}")


def main() -> None:
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    clock = time.process_time if options.processor_time else time.perf_counter
    torch.set_num_threads(1)
    set_seed(0)
    student, teacher = build(options, options.student_width), build(options, options.teacher_width)
    teacher.eval().requires_grad_(False)
    support = draw_support(options.dimension, options.sparsity, seed=0)
    max_steps = options.steps + 1
    dataset = SparseParity(max_steps * options.batch_size, options.dimension, support, seed=1)
    widths = [options.student_width], [options.teacher_width]
    bank = ProjectionBank.create([(1, 1)], *widths).freeze()
    with tempfile.TemporaryDirectory() as folder:
        args = CurriculumDistillationConfig(
            folder,
            max_steps=max_steps,
            per_device_train_batch_size=options.batch_size,
            train_sampling_strategy="sequential",
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            lr_scheduler_type="cosine",
            remove_unused_columns=False,
            logging_steps=1000,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        print(machine(args))
        rows = []
        stages = (Stage(hidden=[(1, 1)]), Stage(kl_weight=1.0))
        with tqdm(total=len(stages) * 3 * options.repeats, leave=False) as bar:
            for stage in stages:
                rows.append(measure(stage, student, teacher, bank, dataset, args, options.repeats, clock, bar))
    report(rows)


if __name__ == "__main__":
    main()
