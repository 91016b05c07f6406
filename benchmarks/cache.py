"""What `teacher_cache` saves: a whole curriculum without it, with an empty one, and with a filled one.

    python benchmarks/cache.py                      # about 8 minutes on one busy CPU core
    python benchmarks/cache.py --teacher_hidden_size 1024 --student_hidden_size 768 --vocab_size 30522 \
        --sequence_length 128 --batches 6           # BERT-large to a 6-layer BERT-base as they are: half an hour

The three train the same student on the same batches, masked once, beforehand. The empty cache is filled in the first
epoch, in which the teacher computes the targets of all stages at once; a filled one is what a second student finds.
Steps are timed from end to end, but for each stage's first, in which operations are counted, once a stage; the losses
of the two with a cache must be the same to the bit.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from stage_cost import Options as Sizes
from stage_cost import build, machine
from tqdm import tqdm
from transformers import HfArgumentParser, PrinterCallback, TrainerCallback

from hf_curriculum_distill import CURRICULUM_EXTRACTION, CurriculumDistillationConfig, CurriculumDistillationTrainer

WAYS = ("no cache", "empty", "filled")


@dataclass
class Options(Sizes):
    """The default is BERT-large to a 6-layer BERT-base, 4 times narrower, the vocabulary too: the same proportions."""

    teacher_layers: int = field(default=24, metadata={"help": "Blocks of the teacher."})
    teacher_hidden_size: int = field(default=256, metadata={"help": "Width of the teacher; 64 units a head."})
    student_layers: int = field(default=6, metadata={"help": "Blocks of the student."})
    student_hidden_size: int = field(default=192, metadata={"help": "Width of the student; 64 units a head."})
    vocab_size: int = field(default=7_630, metadata={"help": "Entries of the vocabulary."})
    batch_size: int = field(default=16, metadata={"help": "Sequences a step."})
    sequence_length: int = field(default=64, metadata={"help": "Tokens a sequence; none is padding."})
    batches: int = field(default=12, metadata={"help": "Batches an epoch."})
    epochs: int = field(default=4, metadata={"help": "Epochs; half of their steps are layer stages."})
    logits: int = field(default=64, metadata={"help": "Classes that the cache keeps of each row of logits."})
    repeats: int = field(default=1, metadata={"help": "Turns each way gets; times are medians over turns."})


class Clock(TrainerCallback):
    """Seconds of each step, from the end of the one before."""

    def __init__(self, clock: Callable[[], float]):
        self.clock, self.seconds = clock, []

    def on_train_begin(self, args, state, control, **kwargs):
        self.begin, self.seconds = self.now(args), []

    def on_step_begin(self, args, state, control, **kwargs):
        if not state.global_step:  # the first step begins here: before it the loader starts
            self.begin = self.now(args)
        torch.manual_seed(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        end = self.now(args)
        self.seconds.append(end - self.begin)
        self.begin = end

    def now(self, args) -> float:
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        return self.clock()


def main() -> None:
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    clock = time.process_time if options.processor_time else time.perf_counter
    if options.processor_time:
        torch.set_num_threads(1)
    torch.manual_seed(0)
    student = build(options, options.student_layers, options.student_hidden_size)
    teacher = build(options, options.teacher_layers, options.teacher_hidden_size).eval().requires_grad_(False)
    ids = torch.randint(options.vocab_size, (options.batches * options.batch_size, options.sequence_length))
    labels = torch.where(torch.rand(ids.shape) < options.masked_share, ids, -100)
    dataset = [{"input_ids": i, "labels": j} for i, j in zip(ids, labels, strict=True)]
    seconds = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder, tqdm(total=3 * options.repeats, leave=False) as bar:
        for turn in range(options.repeats):
            losses = {}
            for way in WAYS:
                bar.set_description(way)
                watch = Clock(clock)
                args = CurriculumDistillationConfig(
                    f"{folder}/run",
                    **CURRICULUM_EXTRACTION,
                    max_steps=options.batches * options.epochs,
                    per_device_train_batch_size=options.batch_size,
                    lr_scheduler_type="constant",
                    calibration_samples=options.batch_size,
                    teacher_cache=None if way == "no cache" else f"{folder}/cache_{turn}",
                    teacher_cache_logits=options.logits,
                    bf16=options.bf16,
                    use_cpu=options.use_cpu,
                    logging_strategy="no",
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                )
                trainer = CurriculumDistillationTrainer(
                    copy.deepcopy(student), args, train_dataset=dataset, teacher_model=teacher, callbacks=[watch]
                )
                trainer.remove_callback(PrinterCallback)
                losses[way] = trainer.train().training_loss
                seconds[way].append(watch.seconds)
                bar.update()
            if losses["empty"] != losses["filled"]:
                raise RuntimeError(f"An empty and a filled cache do not train the same: {losses}")
        size = sum(file.stat().st_size for file in Path(folder, "cache_0").rglob("*") if file.is_file())
    print(machine(args))
    medians = {way: [statistics.median(step) for step in zip(*runs, strict=True)] for way, runs in seconds.items()}
    report(medians, trainer, size, options)


def report(seconds: dict[str, list[float]], trainer, size: int, options: Options) -> None:
    """By stage: steps without cache, those that fill an empty cache (first epoch), and those that read."""
    spans = [trainer.stage_scheduler.span(index) for index in range(len(trainer.stages))]
    plain, empty, filled = (seconds[way] for way in WAYS)
    rows = []
    print(f"\nms a step |{'no cache':>10}{'filling':>10}{'read':>10}  |{'no cache / read':>16}")
    for stage, (begin, end) in zip(trainer.stages, spans, strict=True):
        steps = range(begin + 1, end)
        filling = [empty[step] for step in steps if step < options.batches]
        read = [filled[step] for step in steps] + [empty[step] for step in steps if step >= options.batches]
        rows.append([statistics.median(plain[step] for step in steps), statistics.median(read)])
        first = f"{1000 * statistics.median(filling):10.1f}" if filling else f"{'':10}"
        print(f"{stage.name:10}|{1000 * rows[-1][0]:10.1f}{first}{1000 * rows[-1][1]:10.1f}  |", end="")
        print(f"{rows[-1][0] / rows[-1][1]:16.2f}")
    lengths = [end - begin for begin, end in spans]
    whole = [sum(n * row[way] for n, row in zip(lengths, rows, strict=True)) / sum(lengths) for way in (0, 1)]
    print(f"{'curriculum':10}|{1000 * whole[0]:10.1f}{'':10}{1000 * whole[1]:10.1f}  |{whole[0] / whole[1]:16.2f}")
    entered = {begin for begin, _ in spans}
    first, later = (
        [s for s in range(len(plain)) if (s >= options.batches) == late and s not in entered] for late in (0, 1)
    )
    ratios = [sum(plain[step] for step in steps) / sum(empty[step] for step in steps) for steps in (first, later)]
    print(f"\nAn empty cache: epoch 1 {ratios[0]:.2f} x as fast as without, later epochs {ratios[1]:.2f} x; ", end="")
    print(f"{size / 1e6:.1f} MB on disk for {options.batches * options.batch_size} examples.")
    value = whole[0] / whole[1]
    print(f"\n{'':40}{'target':>8}{'measured':>10}")
    print(f"{'no cache / read, whole curriculum':40} >={3.0:5.2f}{value:10.2f}{'' if value >= 3 else '  missed'}")


if __name__ == "__main__":
    main()
