"""What a step costs beside what one would use instead: a hand-written loop, a Trainer, TextBrewer, torchdistill.

    pip install -e ".[benchmarks]"                        # the two libraries; without them their rows are left out
    python benchmarks/peers.py                            # CPU
    python benchmarks/peers.py --preset h100              # one GPU; no turn begins after 8 minutes

One run, one table: same teacher, student, batches, precision, optimizer and clipping. Everyone takes turns at a whole
curriculum, short in steps but with all its stages, and every step is timed from when it has its batch to when the next
one has. `half-and-half` is what a step costs on average where half of them are in layer stages, equally many each, and
the rest match logits. TextBrewer and torchdistill are set up as documented, without stages: they match all layers'
hidden states and the logits in every step, or the logits alone.
"""

from __future__ import annotations

import copy
import os
import statistics
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from accelerate.utils import convert_outputs_to_fp32
from stage_cost import BareLoop, PeakMemory, WholeModels, build, machine
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, SequentialSampler
from tqdm import tqdm
from transformers import HfArgumentParser, PrinterCallback, Trainer, TrainerCallback, default_data_collator

from hf_curriculum_distill import CurriculumDistillationConfig, CurriculumDistillationTrainer, ProjectionBank, Stage
from hf_curriculum_distill.cost import flop_counter
from hf_curriculum_distill.stages import StageScheduler, resolve_layer_map

MASK = 1  # the token that stands where there is a label
PRESETS = {
    "h100": {
        "teacher": "24x1024",
        "students": ["6x768", "24x768"],
        "vocab_size": 30_522,
        "sequence_lengths": [128, 512],
        "batch_tokens": 16_384,
        "bf16": True,
        "time_limit": 480.0,
    }
}


@dataclass
class Options:
    """The default is BERT-large to a 6-layer BERT-base, every width and the vocabulary divided by 4."""

    preset: str = field(default="", metadata={"help": "'h100': BERT-large to 6 and 24 layers of 768 units, bf16."})
    teacher: str = field(default="24x256", metadata={"help": "Blocks x width of the teacher; 64 units a head."})
    students: list[str] = field(default_factory=lambda: ["6x192"], metadata={"help": "The same of each student."})
    vocab_size: int = field(default=7_632, metadata={"help": "Entries of the vocabulary."})
    sequence_lengths: list[int] = field(default_factory=lambda: [128], metadata={"help": "Tokens a sequence."})
    batch_tokens: int = field(default=1024, metadata={"help": "Tokens a step, in whole sequences without padding."})
    masked_share: float = field(default=0.15, metadata={"help": "Share of the tokens that have a label."})
    steps: int = field(
        default=2, metadata={"help": "Steps of a layer stage in each turn, of which the first isn't timed."}
    )
    repeats: int = field(default=5, metadata={"help": "Timed turns each contender gets; times are medians over them."})
    bf16: bool = field(default=False, metadata={"help": "Whether to run the models under bfloat16 autocast."})
    processor_time: bool = field(
        default=False,
        metadata={"help": "CPU only: one thread, timed by what it computed; for machines that others use meanwhile."},
    )
    time_limit: float = field(default=0.0, metadata={"help": "Seconds after which no turn is begun; 0: no limit."})
    use_cpu: bool = field(default=False, metadata={"help": "Whether to stay on the CPU where there is a GPU."})


class Probe(TrainerCallback):
    """Marks the time at which each step has its batch, and watches one step of each phase of a run."""

    def __init__(self, clock: Callable[[], float], device: torch.device, phases: dict[str, range]):
        self.clock, self.on_gpu, self.phases = clock, device.type == "cuda", phases
        self.num_steps = max(steps.stop for steps in phases.values())
        # the run's last step has no successor whose beginning would end it
        self.watched_steps = {min(steps[-1], self.num_steps - 2): name for name, steps in phases.items()}

    def start(self, make_watch: Callable | None) -> None:
        self.marks, self.watches, self.make_watch, self.open = [], {}, make_watch, None

    def on_step_begin(self, args, state, control, **kwargs):
        self.begin()

    def begin(self) -> None:
        if self.open is not None:
            self.open.__exit__(None, None, None)
            self.open = None
        step = len(self.marks)
        torch.manual_seed(step)  # the same dropout masks for everyone
        if self.on_gpu:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()  # on the device's own clock: a step that is launched early isn't waited for
        else:
            self.marks.append(self.clock())
        if self.make_watch is not None and step in self.watched_steps:
            self.open = self.watches[self.watched_steps[step]] = self.make_watch()
            self.open.__enter__()

    def milliseconds(self) -> dict[str, float]:
        """Median step of each phase. Its first is left out: there the library counts the stage's operations."""
        if self.on_gpu:
            torch.cuda.synchronize()
        marks, times = self.marks, {}
        for name, steps in self.phases.items():
            pairs = [(marks[step], marks[step + 1]) for step in steps[1:] if step + 1 < self.num_steps]
            times[name] = statistics.median(a.elapsed_time(b) if self.on_gpu else 1000 * (b - a) for a, b in pairs)
        return times

    def follow(self, batches: Iterable) -> Iterator:
        """Batches for a loop that calls back nowhere else."""
        for batch in batches:
            self.begin()
            yield batch


class Costs:
    """Operations and peak memory of what runs inside."""

    def __init__(self, device: torch.device):
        self.memory, self.counter = PeakMemory(device), flop_counter()

    def __enter__(self):
        self.memory.__enter__()
        self.counter.__enter__()

    def __exit__(self, *error):
        self.counter.__exit__(*error)
        self.memory.__exit__(*error)


class ByHand(BareLoop):
    """The floor: for each stage what it needs, and nothing else."""

    def __init__(self, model, args, train_dataset, probe, teacher, scheduler: StageScheduler, bank: ProjectionBank):
        super().__init__(model, args, train_dataset, [probe], teacher, Stage(kl_weight=1.0), bank)
        self.scheduler, self.projections = scheduler, {}
        for pair in bank.layer_pairs:
            weight, mean, std = (bank.tensors()[f"layer_{pair[0]}_{pair[1]}.{n}"] for n in ("weight", "mean", "std"))
            self.projections[pair] = weight / std[:, None], -mean / std

    def train(self) -> float:
        total = 0.0
        for step, batch in enumerate(self.probe.follow(loader(self.dataset, self.args))):
            batch = {name: tensor.to(self.args.device, non_blocking=True) for name, tensor in batch.items()}
            self.stage = self.scheduler.stage_at(step)
            if self.stage.hidden:
                self.projection = self.projections[self.stage.hidden[0]]
            loss = self.layer_loss(batch) if self.stage.hidden else self.logit_loss(batch)
            loss.backward()
            clip_grad_norm_(self.student.parameters(), self.args.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            total += loss.detach()
        return total.item() / (step + 1)


class WholeModelsInStages(WholeModels):
    """The usual way, stage after stage; of the logits it picks the rows that have a label."""

    def __init__(self, *args, scheduler: StageScheduler, **kwargs):
        super().__init__(*args, stage=None, **kwargs)
        self.scheduler = scheduler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.stage = self.scheduler.stage_at(self.state.global_step)
        return super().compute_loss(model, inputs)


class AllRows(WholeModelsInStages):
    """The same without the picking: the divergence of every row, of which those that have a label are averaged."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.scheduler.stage_at(self.state.global_step).hidden:
            return super().compute_loss(model, inputs)
        counts = inputs.pop("labels").ne(-100)
        outputs = model(**inputs, output_hidden_states=True)
        with torch.no_grad(), self.accelerator.autocast():
            teacher_outputs = self.teacher(**inputs, output_hidden_states=True)
        logits, target = (o.logits.float().log_softmax(-1) for o in (outputs, teacher_outputs))
        rows = F.kl_div(logits, target, reduction="none", log_target=True).sum(-1)
        return (rows * counts).sum() / counts.sum()


class TextBrewer:
    """`GeneralDistiller` as in its quick start, with its `logits_mask` where `all_rows` is off.

    Its batches have no labels: else both models would compute the cross-entropy beside their logits.
    """

    temperature = 8  # of its own experiments

    def __init__(self, model, args, train_dataset, probe, teacher, pairs, all_rows: bool = False):
        self.student, self.args, self.dataset, self.probe = model, args, train_dataset, probe
        self.teacher, self.pairs, self.all_rows = teacher, pairs, all_rows

    def adapt(self, batch, outputs):
        adapted = {"logits": outputs.logits}
        if self.pairs:
            adapted["hidden"] = outputs.hidden_states
        if not self.all_rows:
            adapted["logits_mask"] = batch["input_ids"].eq(MASK)
        return adapted

    def train(self) -> None:
        from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig

        widths = self.student.config.hidden_size, self.teacher.config.hidden_size
        match = {"feature": "hidden", "loss": "hidden_mse", "weight": 1}
        matches = [{"layer_S": s, "layer_T": t, "proj": ["linear", *widths], **match} for s, t in self.pairs]
        num_steps, folder = self.probe.num_steps, self.args.output_dir
        distiller = GeneralDistiller(
            TrainingConfig(device=self.args.device, output_dir=folder, ckpt_steps=num_steps),
            DistillationConfig(temperature=self.temperature, intermediate_matches=matches),
            *(Autocast(model, self.args) for model in (self.teacher, self.student)),
            *(self.adapt, self.adapt),
        )
        optimizer, kwargs = Trainer.get_optimizer_cls_and_kwargs(self.args, self.student)
        with distiller:
            distiller.train(
                optimizer(self.student.parameters(), **kwargs),
                self.probe.follow(loader(self.dataset, self.args)),
                num_steps=num_steps,
                max_grad_norm=self.args.max_grad_norm,
                output_hidden_states=bool(self.pairs),
            )
        self.teacher.eval()  # which it leaves in training mode; the others use the same teacher


class Torchdistill:
    """A `DistillationBox` as in its examples for transformers: whole models, hooks on the blocks, a weighted sum."""

    def __init__(self, model, args, train_dataset, probe, teacher, pairs):
        self.student, self.args, self.dataset, self.probe = model, args, train_dataset, probe
        self.teacher, self.pairs = teacher, pairs
        register_with_torchdistill()

    def train(self) -> None:
        from torchdistill.core.distillation import get_distillation_box

        box = get_distillation_box(
            *(Autocast(model, self.args) for model in (self.teacher, self.student)),
            {"train": self.dataset},
            self.settings(),
            *(self.args.device, [], False, 1),
        )
        box.pre_epoch_process(epoch=0)
        for batch in self.probe.follow(box.train_data_loader):
            batch = {name: tensor.to(self.args.device, non_blocking=True) for name, tensor in batch.items()}
            box.pre_forward_process()
            loss = box.forward_process(batch, targets=batch["input_ids"].eq(MASK))
            box.post_forward_process(loss=loss)
        for _, hook in box.target_teacher_pairs + box.target_student_pairs:
            hook.remove()  # the others use the same teacher
        self.teacher.eval()

    def settings(self) -> dict:
        optimizer, kwargs = Trainer.get_optimizer_cls_and_kwargs(self.args, self.student)
        blocks = {s: f"student_model.model.bert.encoder.layer.{s - 1}" for s, _ in self.pairs}
        targets = {s: f"model.bert.encoder.layer.{t - 1}" for s, t in self.pairs}
        terms = {"kd": {"criterion": {"key": "MaskedKDLoss", "kwargs": {"temperature": 1.0}}, "weight": 1.0}}
        for layer in blocks:
            sides = {
                "input": {"is_from_teacher": False, "module_path": f"regressors.{layer}", "io": "output"},
                "target": {"is_from_teacher": True, "module_path": targets[layer], "io": "output"},
            }
            terms[f"hint {layer}"] = {
                "criterion": {"key": "MSELoss", "kwargs": {}},
                "criterion_wrapper": {"key": "SimpleLossWrapper", "kwargs": sides},
                "weight": 1.0,
            }
        widths = [self.student.config.hidden_size, self.teacher.config.hidden_size]
        regressors = {"key": "Regressors", "kwargs": {"paths": blocks, "widths": widths}}
        return {
            "num_epochs": 1,
            "train_data_loader": {
                "dataset_id": "train",
                "sampler": {"class_or_func": SequentialSampler},
                "collate_fn": "default_data_collator",
                "requires_supp": False,
                "kwargs": {"batch_size": self.args.train_batch_size, "pin_memory": self.args.device.type == "cuda"},
            },
            "teacher": {
                "forward_proc": "forward_batch_only_as_kwargs",
                "forward_hook": {"output": list(targets.values())},
                "requires_grad": False,
            },
            "student": {
                "forward_proc": "forward_batch_only_as_kwargs",
                "forward_hook": {"output": [*blocks.values(), *(f"regressors.{layer}" for layer in blocks)]},
                "auxiliary_model_wrapper": regressors,
            },
            "optimizer": {"key": optimizer.__name__, "kwargs": kwargs, "max_grad_norm": self.args.max_grad_norm},
            "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
        }


def register_with_torchdistill() -> None:
    """What its registries lack for masked tokens: rows picked before its KD loss, one linear map a student block."""
    from torchdistill.datasets.registry import register_collate_func
    from torchdistill.losses.mid_level import KDLoss
    from torchdistill.losses.registry import register_mid_level_loss
    from torchdistill.models.registry import register_auxiliary_model_wrapper
    from torchdistill.models.wrapper import AuxiliaryModelWrapper

    class MaskedKDLoss(KDLoss):
        def __init__(self, temperature):
            super().__init__(".", "logits", ".", "logits", temperature, alpha=0.0)

        def forward(self, student_io_dict, teacher_io_dict, targets=None):
            picked = ({".": {"logits": io["."]["output"].logits[targets]}} for io in (student_io_dict, teacher_io_dict))
            return super().forward(*picked)

    class Regressors(AuxiliaryModelWrapper):
        def __init__(self, student_model, paths, widths, device, **kwargs):
            super().__init__()
            self.student_model, self.paths = student_model, paths
            self.regressors = torch.nn.ModuleDict({str(layer): torch.nn.Linear(*widths) for layer in paths})

        def forward(self, **inputs):
            return self.student_model(**inputs)

        def secondary_forward(self, io_dict):
            for layer, path in self.paths.items():
                self.regressors[str(layer)](io_dict[path]["output"])

    register_mid_level_loss(MaskedKDLoss)
    register_auxiliary_model_wrapper(Regressors)
    register_collate_func(default_data_collator)


class Autocast(torch.nn.Module):
    """A model in the run's precision, outputs in float32, as accelerate wraps it for a Trainer."""

    def __init__(self, model, args):
        super().__init__()
        self.model, self.config, self.args = model, model.config, args

    def forward(self, **inputs):
        if not self.args.bf16:
            return self.model(**inputs)
        with torch.autocast(self.args.device.type, torch.bfloat16):
            return convert_outputs_to_fp32(self.model.forward)(**inputs)


def masked_text(options: Options, count: int, length: int) -> list[dict[str, torch.Tensor]]:
    """Random tokens, some of which are to be guessed."""
    labels = torch.randint(MASK + 1, options.vocab_size, (count, length))
    masked = torch.rand(labels.shape) < options.masked_share
    labels, ids = labels.masked_fill(~masked, -100), labels.masked_fill(masked, MASK)
    return [{"input_ids": i, "labels": j} for i, j in zip(ids, labels, strict=True)]


def loader(dataset, args) -> DataLoader:
    pin = args.device.type == "cuda"
    return DataLoader(dataset, args.train_batch_size, collate_fn=default_data_collator, pin_memory=pin)


class Library(CurriculumDistillationTrainer):
    """As it is, but a training returns the mean loss of all stages' steps, and not that of the last stage's."""

    def training_step(self, *args, **kwargs):
        self.step_losses.append(super().training_step(*args, **kwargs))
        return self.step_losses[-1]

    def train(self, *args, **kwargs) -> float:
        self.step_losses = []
        super().train(*args, **kwargs)
        return torch.stack(self.step_losses).mean().item()


@dataclass
class Contender:
    """One way to train, and what its steps cost: a dict of phases for each turn."""

    name: str
    run: object
    probe: Probe
    losses: list[float | None] = field(default_factory=list)
    milliseconds: list[dict[str, float]] = field(default_factory=list)
    flops: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, float] = field(default_factory=dict)

    def take_turn(self, make_watch: Callable | None = None) -> dict:
        self.probe.start(make_watch)
        result = self.run.train()
        self.losses.append(getattr(result, "training_loss", result))
        return self.probe.watches


LIBRARY, BLOCK, BY_HAND, TRAINER, PICKED = "library", "library, block", "by hand", "Trainer", "Trainer, rows picked"
TEXTBREWER, TEXTBREWER_ALL, TORCHDISTILL = "TextBrewer, logits_mask", "TextBrewer, quick start", "torchdistill"
WHOLE, LAYERS, KL = "half-and-half", "layer stages", "kl (one-shot)"


def line_up(options: Options, args, student, teacher, dataset, clock) -> list[Contender]:
    """Everyone who takes part, with a student of its own."""
    stages = args.resolve_stages(student.config.num_hidden_layers, teacher.config.num_hidden_layers)
    scheduler = StageScheduler(stages, args.max_steps)
    phases = {stage.name: range(*scheduler.span(index)) for index, stage in enumerate(stages)}
    phases[KL] = phases.pop("kl")
    pairs = [pair for stage in stages for pair in stage.hidden]
    widths = ([model.config.hidden_size] * len(pairs) for model in (student, teacher))
    bank = ProjectionBank.create(pairs, *widths).freeze().to(args.device)
    contenders = []

    def enter(name: str, make: Callable, phases: dict[str, range], **kwargs) -> None:
        probe = Probe(clock, args.device, phases)
        given = {"model": copy.deepcopy(student), "args": args, "train_dataset": dataset}
        as_trainer = isinstance(make, type) and issubclass(make, Trainer)
        run = make(**given | ({"callbacks": [probe]} if as_trainer else {"probe": probe}) | kwargs)
        if as_trainer:
            run.remove_callback(PrinterCallback)
        contenders.append(Contender(name, run, probe))

    for name, prefix in ((LIBRARY, "joint"), (BLOCK, "block")):
        own_args = copy.copy(args)
        own_args.train_prefix = prefix
        own = {"args": own_args, "teacher_model": teacher, "projection_bank": copy.deepcopy(bank)}
        enter(name, Library, phases, **own)
    same = {"teacher": teacher, "scheduler": scheduler, "bank": bank}
    enter(BY_HAND, ByHand, phases, **same)
    enter(TRAINER, AllRows, phases, **same)
    enter(PICKED, WholeModelsInStages, phases, **same)
    count = (2 * options.steps + 1) * args.train_batch_size
    examples = [{"input_ids": example["input_ids"]} for example in dataset[:count]]
    for matched, phase in ((pairs, WHOLE), ([], KL)):
        given = {
            "train_dataset": examples,
            "teacher": teacher,
            "phases": {phase: range(2 * options.steps + 1)},
            "pairs": matched,
        }
        if find_spec("textbrewer"):
            enter(TEXTBREWER, TextBrewer, **given)
            enter(TEXTBREWER_ALL, TextBrewer, **given, all_rows=True)
        if find_spec("torchdistill"):
            enter(TORCHDISTILL, Torchdistill, **given)
    return contenders


def measure(contenders: list[Contender], options: Options, args, deadline: float) -> None:
    """The first turns count operations and memory, and warm up; then A B C A B C."""
    turns = tqdm(total=len(contenders) * (options.repeats + 1), leave=False)

    def everyone(description: str) -> Iterator[Contender]:
        for contender in contenders:
            turns.set_description(f"{description}: {contender.name}")
            yield contender
            turns.update()

    for contender in everyone("operations"):
        watches = contender.take_turn(lambda: Costs(args.device))
        contender.flops = {name: watch.counter.get_total_flops() for name, watch in watches.items()}
        contender.bytes = {name: watch.memory.bytes for name, watch in watches.items()}
    check_losses(contenders, args)
    for repeat in range(options.repeats):
        if repeat and time.monotonic() > deadline:
            break
        for contender in everyone("time"):
            contender.take_turn()
            contender.milliseconds.append(contender.probe.milliseconds())
    turns.close()
    for contender in contenders:
        add_averages(contender)


def check_losses(contenders: list[Contender], args) -> None:
    """Who trains the same stages has the same mean loss over the first run."""
    losses = {c.name: c.losses[0] for c in contenders if c.name in (LIBRARY, BY_HAND, TRAINER, PICKED)}
    if max(losses.values()) - min(losses.values()) > (1e-2 if args.bf16 else 1e-3) * max(losses.values()):
        raise RuntimeError(f"The mean losses of those who train the same stages differ: {losses}")


def add_averages(contender: Contender) -> None:
    """The mean over layer stages, and over the whole curriculum, half of whose steps they are."""
    if KL not in contender.flops or len(contender.flops) == 1:
        return
    for values in (*contender.milliseconds, contender.flops):
        layers = [value for name, value in values.items() if name != KL]
        values[LAYERS] = statistics.mean(layers)
        values[WHOLE] = (values[LAYERS] + values[KL]) / 2
    layers = [value for name, value in contender.bytes.items() if name != KL]
    contender.bytes |= {LAYERS: max(layers), WHOLE: max(*layers, contender.bytes[KL])}


def ratio(contenders: list[Contender], phase: str, one: str, other: str) -> float:
    """The time of `one` over that of `other`, both medians over turns."""
    medians = {c.name: median_time(c, phase) for c in contenders if phase in c.flops}
    return medians[one] / medians[other]


def median_time(contender: Contender, phase: str) -> float:
    return statistics.median(turn[phase] for turn in contender.milliseconds)


def report(contenders: list[Contender], ceiling: float, tokens: int) -> None:
    library = contenders[0]
    phases = [name for name in library.probe.phases if name != KL]
    shown = [*dict.fromkeys([phases[0], phases[(len(phases) - 1) // 2], phases[-1]]), LAYERS, KL, WHOLE]
    head = ["stage", "who", "time / library", "operations / library", "peak / library"]
    print_row(*head, "ms a step", "tokens/s", "MFU", "peak MiB", "hours for 1e9 tokens")
    print_row(*["---"] * 10)
    for phase in shown:
        for contender in (c for c in contenders if phase in c.flops):
            ms = median_time(contender, phase)
            print_row(
                phase,
                contender.name,
                f"{ratio(contenders, phase, contender.name, LIBRARY):.2f}",
                f"{contender.flops[phase] / library.flops[phase]:.2f}",
                f"{contender.bytes[phase] / library.bytes[phase]:.2f}",
                f"{ms:.1f}",
                f"{1000 * tokens / ms:,.0f}",
                f"{contender.flops[phase] / (ms / 1000) / ceiling:.0%}",
                f"{contender.bytes[phase] / 2**20:.0f}",
                f"{1e9 / tokens * ms / 3.6e6:,.1f}",
            )

    worst = max([*phases, KL], key=lambda phase: ratio(contenders, phase, LIBRARY, BY_HAND))
    targets = [
        (f"time, {worst} (the worst stage)", "<=", 1.05, LIBRARY, BY_HAND, worst),
        ("time, layer stages", ">=", 1.7, TRAINER, LIBRARY, LAYERS),
        ("time, kl", ">=", 1.15, TRAINER, LIBRARY, KL),
        ("time, half-and-half", ">=", 1.41, TRAINER, LIBRARY, WHOLE),
        ("time, half-and-half", ">=", 1.48, TRAINER, BLOCK, WHOLE),
        ("time, half-and-half", ">=", 2.0, TEXTBREWER, LIBRARY, WHOLE),
        ("time, half-and-half", ">=", 2.0, TEXTBREWER_ALL, LIBRARY, WHOLE),
        ("peak memory, kl", "<=", 0.4, LIBRARY, TRAINER, KL),
    ]
    print()
    print_row("what", "of", "target", "measured", "operations")
    print_row(*["---"] * 5)
    by_name = {(c.name, phase): c for c in contenders for phase in c.flops}
    for what, sign, target, one, other, phase in targets:
        if (one, phase) not in by_name:
            continue
        a, b = by_name[one, phase], by_name[other, phase]
        on_time = what.startswith("time")
        value = ratio(contenders, phase, one, other) if on_time else a.bytes[phase] / b.bytes[phase]
        missed = "" if (value <= target if sign == "<=" else value >= target) else ", missed"
        allowed = f"{a.flops[phase] / b.flops[phase]:.2f}" if on_time else ""
        print_row(what, f"{one} / {other}", f"{sign} {target:.2f}", f"{value:.2f}{missed}", allowed)


def print_row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |")


def matrix_product_ceiling(args, clock: Callable[[], float]) -> float:
    """The most operations a second that a large square matrix product reaches here, in the run's precision."""
    on_gpu, size = args.device.type == "cuda", 8192 if args.device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=args.device, dtype=torch.bfloat16 if args.bf16 else None) for _ in "ab")
    seconds = []
    for _ in range(20):
        start = clock()
        a @ b
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    return 2 * size**3 / min(seconds)


def main() -> None:
    started = time.monotonic()
    parser = HfArgumentParser(Options)
    if preset := parser.parse_known_args()[0].preset:
        parser.set_defaults(**PRESETS[preset])
    (options,) = parser.parse_args_into_dataclasses()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the memory profiler announces each start and stop
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    clock = time.process_time if options.processor_time else time.perf_counter
    if options.processor_time:
        torch.set_num_threads(1)
    cases = [(student, length) for length in options.sequence_lengths for student in options.students]
    for number, (student_size, length) in enumerate(cases):
        depth, width = map(int, student_size.split("x"))
        teacher_depth, teacher_width = map(int, options.teacher.split("x"))
        pairs = resolve_layer_map("uniform", None, depth, teacher_depth)
        stages = [{"hidden": [pair], "until": n * options.steps} for n, pair in enumerate(pairs, start=1)]
        # the logit stage is half of the curriculum: twice as many; and a step ends where the next begins: one more
        batch_size, max_steps = options.batch_tokens // length, (depth + 2) * options.steps + 1
        with tempfile.TemporaryDirectory() as folder:
            args = CurriculumDistillationConfig(
                folder,
                max_steps=max_steps,
                stages=[*stages, {"kl_weight": 1.0}],
                per_device_train_batch_size=batch_size,
                train_sampling_strategy="sequential",
                lr_scheduler_type="constant",
                bf16=options.bf16,
                use_cpu=options.use_cpu,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            if not number:
                ceiling = matrix_product_ceiling(args, clock)
                peers = [f"{name} {version(name)}" for name in ("textbrewer", "torchdistill") if find_spec(name)]
                print(", ".join([machine(args), *peers]))
                print(f"matrix product: {ceiling / 1e12:.3g} TFLOP/s in {'bf16' if options.bf16 else 'fp32'}")
            torch.manual_seed(0)
            sizes = {"vocab_size": options.vocab_size, "sequence_length": length}
            student = build(Namespace(**sizes), depth, width).to(args.device)
            teacher = build(Namespace(**sizes), teacher_depth, teacher_width).eval().requires_grad_(False)
            dataset = masked_text(options, max_steps * batch_size, length)
            contenders = line_up(options, args, student, teacher.to(args.device), dataset, clock)
            left = options.time_limit - (time.monotonic() - started) if options.time_limit else float("inf")
            measure(contenders, options, args, time.monotonic() + left / (len(cases) - number))
        turns = len(contenders[0].milliseconds)
        print(f"\n{options.teacher} -> {student_size}, {batch_size} x {length} tokens, medians of {turns} turn(s)\n")
        report(contenders, ceiling, batch_size * length)
        del contenders


if __name__ == "__main__":
    main()
