"""What a step of each stage costs, three ways: this library, a bare loop, whole models under `transformers.Trainer`.

    python benchmarks/stage_cost.py                      # about 5 minutes on 2 idle CPU cores
    python benchmarks/stage_cost.py --teacher_layers 24 --teacher_hidden_size 1024 --student_layers 6 \
        --student_hidden_size 768 --batch_size 32 --sequence_length 512 --bf16 --steps 20     # one GPU

The bare loop is the floor: sliced encoders, no heads in layer stages, heads on the masked rows in the logit stage.
Whole models are what a Trainer with its own `compute_loss` runs: every block, all hidden states, all rows of logits.
The three share weights, batches, dropout masks, optimizer and clipping, and take turns; their losses must agree.
"""

from __future__ import annotations

import copy
import itertools
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch.nn.utils import clip_grad_norm_
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    BertConfig,
    BertForMaskedLM,
    HfArgumentParser,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    default_data_collator,
)

from hf_curriculum_distill import CurriculumDistillationConfig, CurriculumDistillationTrainer, ProjectionBank, Stage
from hf_curriculum_distill.cost import flop_counter
from hf_curriculum_distill.stages import resolve_layer_map


@dataclass
class Options:
    """The default is BERT-large to a 6-layer BERT-base in small: 4 times as deep, 4/3 as wide."""

    teacher_layers: int = field(default=12, metadata={"help": "Blocks of the teacher."})
    teacher_hidden_size: int = field(default=512, metadata={"help": "Width of the teacher; 64 units a head."})
    student_layers: int = field(default=3, metadata={"help": "Blocks of the student."})
    student_hidden_size: int = field(default=384, metadata={"help": "Width of the student; 64 units a head."})
    vocab_size: int = field(default=30_522, metadata={"help": "Entries of the vocabulary."})
    batch_size: int = field(default=8, metadata={"help": "Sequences a step."})
    sequence_length: int = field(default=128, metadata={"help": "Tokens a sequence; none is padding."})
    masked_share: float = field(default=0.15, metadata={"help": "Share of the tokens that have a label."})
    steps: int = field(default=2, metadata={"help": "Timed steps a repeat."})
    repeats: int = field(default=3, metadata={"help": "Turns each way gets; times are medians over turns."})
    bf16: bool = field(default=False, metadata={"help": "Whether to run the models under bfloat16 autocast."})
    processor_time: bool = field(
        default=False,
        metadata={"help": "CPU only: one thread, timed by what it computed; for machines that others use meanwhile."},
    )
    use_cpu: bool = field(default=False, metadata={"help": "Whether to stay on the CPU where there is a GPU."})


class Probe(TrainerCallback):
    """Times the steps of a run from end to end, data included, and puts its last step inside the context `watch`."""

    def __init__(self, clock: Callable[[], float]):
        self.clock, self.watch, self.ends = clock, nullcontext(), []

    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed(state.global_step)  # the same dropout masks for everyone
        if state.global_step == state.max_steps - 1:
            self.watch.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            self.watch.__exit__(None, None, None)
        on_gpu = args.device.type == "cuda"
        end = torch.cuda.Event(enable_timing=True) if on_gpu else self.clock()
        if on_gpu:
            end.record()  # on the device's own clock: a step that is launched early isn't waited for
        self.ends.append(end)

    def milliseconds(self) -> float:
        """Median step of the run that just ended."""
        ends, self.ends = self.ends, []
        if isinstance(ends[0], float):
            return 1000 * statistics.median(b - a for a, b in itertools.pairwise(ends))
        torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(ends))


class PeakMemory:
    """Bytes allocated at the worst moment, on top of what was held on entering (weights and optimizer state).

    On the CPU from the profiler's record of every allocation by torch, which unlike the process's resident size does
    not depend on what the C library gives back, or on what ran before.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"

    def __enter__(self):
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.held = torch.cuda.memory_allocated()
        else:
            self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True).__enter__()

    def __exit__(self, *error):
        if self.on_gpu:
            self.bytes = torch.cuda.max_memory_allocated() - self.held
            return
        self.profile.__exit__(*error)
        events = self.profile.profiler.kineto_results.events()
        self.bytes = max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


class BareLoop:
    """The floor: what a stage needs, and nothing else."""

    def __init__(self, model, args, train_dataset, callbacks, teacher, stage, bank):
        self.student, self.args, self.dataset, (self.probe,) = model.train(), args, train_dataset, callbacks
        self.teacher, self.stage = teacher, stage
        for pair in stage.hidden:
            weight, mean, std = (bank.tensors()[f"layer_{pair[0]}_{pair[1]}.{n}"] for n in ("weight", "mean", "std"))
            self.projection = weight / std[:, None], -mean / std
        optimizer, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        self.optimizer = optimizer(model.parameters(), **kwargs)

    def train(self) -> float:
        args, state, total = self.args, TrainerState(max_steps=self.args.max_steps), 0.0
        pin = args.device.type == "cuda"
        for batch in DataLoader(self.dataset, args.train_batch_size, collate_fn=default_data_collator, pin_memory=pin):
            batch = {name: tensor.to(args.device, non_blocking=True) for name, tensor in batch.items()}
            self.probe.on_step_begin(args, state, None)
            loss = self.layer_loss(batch) if self.stage.hidden else self.logit_loss(batch)
            loss.backward()
            clip_grad_norm_(self.student.parameters(), args.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            total += loss.detach()
            state.global_step += 1
            self.probe.on_step_end(args, state, None)
        return total.item() / state.max_steps

    def layer_loss(self, batch):
        ((student_layer, teacher_layer),) = self.stage.hidden
        hidden = self.run_prefix(self.student, batch, student_layer)
        with torch.inference_mode():
            target = self.run_prefix(self.teacher, batch, teacher_layer)
        return F.mse_loss(hidden.float(), F.linear(target.float(), *self.projection))

    def logit_loss(self, batch):
        rows = batch["labels"].flatten().ne(-100).nonzero().squeeze(1)
        logits = self.run_with_head(self.student, batch, rows)
        with torch.inference_mode():
            target = self.run_with_head(self.teacher, batch, rows)
        logits, target = (each.float().log_softmax(-1) for each in (logits, target))
        return F.kl_div(logits, target, reduction="sum", log_target=True) / len(rows)

    def run_prefix(self, model, batch, depth):
        with self.autocast():
            hidden = model.bert.embeddings(batch["input_ids"])
            for block in model.bert.encoder.layer[:depth]:
                hidden = block(hidden)
        return hidden

    def run_with_head(self, model, batch, rows):
        hidden = self.run_prefix(model, batch, None)
        with self.autocast():
            return model.cls(hidden.flatten(0, 1)[rows])

    def autocast(self):
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16)


class WholeModels(Trainer):
    """The usual way: both whole models, all hidden states, logits on all rows; what is needed is picked at the end."""

    def __init__(self, *args, teacher, stage, bank, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher, self.stage, self.bank = teacher, stage, bank

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs, output_hidden_states=True)
        with torch.no_grad(), self.accelerator.autocast():
            teacher_outputs = self.teacher(**inputs, output_hidden_states=True)
        if self.stage.hidden:
            ((student_layer, teacher_layer),) = self.stage.hidden
            target = self.bank.project(student_layer, teacher_outputs.hidden_states[teacher_layer])
            return F.mse_loss(outputs.hidden_states[student_layer].float(), target)
        rows = labels.ne(-100)
        logits, target = (o.logits[rows].float().log_softmax(-1) for o in (outputs, teacher_outputs))
        return F.kl_div(logits, target, reduction="sum", log_target=True) / rows.sum()


@dataclass
class Row:
    """One stage; every list in the order library, floor, whole models."""

    stage: str
    milliseconds: list[float]
    flops: list[int]
    bytes: list[int]
    over_floor: float
    over_library: float

    @property
    def flops_over_library(self) -> float:
        return self.flops[2] / self.flops[0]


def measure(stage: Stage, name: str, student, teacher, bank, dataset, args, repeats: int, clock, bar: tqdm) -> Row:
    args = copy.copy(args)
    args.stages = [vars(stage)]
    probes, runs = [Probe(clock) for _ in range(3)], []
    for probe, make in zip(probes, (CurriculumDistillationTrainer, BareLoop, WholeModels), strict=True):
        given = {"model": copy.deepcopy(student), "args": args, "train_dataset": dataset, "callbacks": [probe]}
        if make is CurriculumDistillationTrainer:
            run = make(**given, teacher_model=teacher, projection_bank=copy.deepcopy(bank) if stage.hidden else None)
        else:
            run = make(**given, teacher=teacher, stage=stage, bank=bank)
        if isinstance(run, Trainer):
            run.remove_callback(PrinterCallback)
        runs.append(run)

    def take_turns(description, watch=nullcontext):
        bar.set_description(f"{name}: {description}")
        results, watched = [], []
        for run, probe in zip(runs, probes, strict=True):
            probe.watch = watch()
            results.append(run.train())
            watched.append(probe.watch)
            bar.update()
        return [result if isinstance(result, float) else result.training_loss for result in results], watched

    # the first turns count, and warm up
    losses, counters = take_turns("operations", flop_counter)
    if max(losses) - min(losses) > (1e-2 if args.bf16 else 1e-4) * max(losses):
        raise RuntimeError(f"{name}: the losses of library, floor and whole models differ: {losses}")
    _, memories = take_turns("memory", lambda: PeakMemory(args.device))
    for probe in probes:
        probe.ends.clear()
    turns = []
    for _ in range(repeats):
        take_turns("time")
        turns.append([probe.milliseconds() for probe in probes])
    library, floor, whole = np.median(turns, axis=0).tolist()
    return Row(
        stage=name,
        milliseconds=[library, floor, whole],
        flops=[counter.get_total_flops() for counter in counters],
        bytes=[memory.bytes for memory in memories],
        over_floor=library / floor,
        over_library=whole / library,
    )


def build(options: Options, layers: int, width: int) -> BertForMaskedLM:
    config = BertConfig(
        vocab_size=options.vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        intermediate_size=4 * width,
        max_position_embeddings=max(512, options.sequence_length),
    )
    return BertForMaskedLM(config)


def masked_text(options: Options) -> list[dict[str, torch.Tensor]]:
    """Random tokens for one turn: one more step than is timed, since steps are timed from end to end."""
    ids = torch.randint(options.vocab_size, ((options.steps + 1) * options.batch_size, options.sequence_length))
    labels = torch.where(torch.rand(ids.shape) < options.masked_share, ids, -100)
    return [{"input_ids": i, "labels": j} for i, j in zip(ids, labels, strict=True)]


def machine(args) -> str:
    cpu = platform.processor()
    if (info := Path("/proc/cpuinfo")).exists() and (named := re.search(r"model name\s*: (.*)", info.read_text())):
        cpu = named[1]
    facts = [torch.cuda.get_device_name()] if args.device.type == "cuda" else []
    facts += [f"{cpu}, {os.cpu_count()} cores, threads: {torch.get_num_threads()}"]
    return ", ".join([*facts, f"torch {torch.__version__}", f"transformers {transformers.__version__}"])


def report(rows: list[Row], depth: int) -> None:
    *layer_rows, logit_row = rows
    print(f"\n{'':10}|{'ms a step':^29}|{'library / floor':^17}|{'whole / library':^19}|{'peak MiB':^26}")
    print(f"{'stage':10}|{'library':>9}{'floor':>9}{'whole':>9}  |{'time':^17}|{'time':>8}{'FLOPs':>9}  |", end="")
    print(f"{'library':>8}{'floor':>8}{'whole':>8}")
    for row in rows:
        print(f"{row.stage:10}|" + "".join(f"{ms:9.1f}" for ms in row.milliseconds), end="  |")
        print(f"{row.over_floor:^17.3f}|{row.over_library:8.2f}{row.flops_over_library:9.2f}", end="  |")
        print("".join(f"{held / 2**20:8.1f}" for held in row.bytes))

    # half of the steps in the layer stages, equally many each; those between the measured ones cost what lies between
    measured = [int(row.stage.split()[1]) for row in layer_rows]

    def half_and_half(values: list[list[float]]) -> np.ndarray:
        *layers, logits = np.array(values, dtype=float)
        every = [np.interp(range(1, depth + 1), measured, column).mean() for column in np.transpose(layers)]
        return (np.array(every) + logits) / 2

    library, floor, whole = half_and_half([row.milliseconds for row in rows])
    flops = half_and_half([row.flops for row in rows])
    print(f"{'half-half':10}|{library:9.1f}{floor:9.1f}{whole:9.1f}  |", end="")
    print(f"{library / floor:^17.3f}|{whole / library:8.2f}{flops[2] / flops[0]:9.2f}  |")

    by_layer = statistics.mean(row.over_library for row in layer_rows)
    memory = logit_row.bytes[0] / logit_row.bytes[2]
    targets = [
        ("library / floor, time, worst stage", "<=", 1.10, max(row.over_floor for row in rows)),
        ("whole / library, time, mean over layer stages", ">=", 1.6, by_layer),
        ("whole / library, time, logit stage", ">=", 1.1, logit_row.over_library),
        ("library / whole, peak memory, logit stage", "<=", 0.5, memory),
    ]
    print(f"\n{'':48}{'target':>8}{'measured':>10}")
    for what, sign, target, value in targets:
        missed = "" if (value <= target if sign == "<=" else value >= target) else "  missed"
        print(f"{what:48}{sign:>3}{target:5.2f}{value:10.2f}{missed}")


def main() -> None:
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the memory profiler announces each start and stop
    clock = time.process_time if options.processor_time else time.perf_counter
    if options.processor_time:
        torch.set_num_threads(1)
    torch.manual_seed(0)
    student = build(options, options.student_layers, options.student_hidden_size)
    teacher = build(options, options.teacher_layers, options.teacher_hidden_size).eval().requires_grad_(False)
    dataset = masked_text(options)
    pairs = dict(resolve_layer_map("uniform", None, options.student_layers, options.teacher_layers))
    chosen = sorted({1, (options.student_layers + 1) // 2, options.student_layers})
    stages = {f"layer {layer}": Stage(hidden=[(layer, pairs[layer])]) for layer in chosen} | {"kl": Stage(kl_weight=1)}
    with tempfile.TemporaryDirectory() as folder:
        args = CurriculumDistillationConfig(
            folder,
            max_steps=options.steps + 1,
            per_device_train_batch_size=options.batch_size,
            train_sampling_strategy="sequential",
            lr_scheduler_type="constant",
            bf16=options.bf16,
            use_cpu=options.use_cpu,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        print(machine(args))
        teacher.to(args.device)
        student.to(args.device)
        rows = []
        with tqdm(total=len(stages) * 3 * (options.repeats + 2), leave=False) as bar:
            for name, stage in stages.items():
                widths = options.student_hidden_size, options.teacher_hidden_size
                bank = ProjectionBank.create(stage.hidden, *([width] * len(stage.hidden) for width in widths))
                bank.freeze().to(args.device)
                rows.append(measure(stage, name, student, teacher, bank, dataset, args, options.repeats, clock, bar))
    report(rows, options.student_layers)


if __name__ == "__main__":
    main()
