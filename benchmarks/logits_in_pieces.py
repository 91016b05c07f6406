"""What logits in pieces cost: gradients of each chunk at once, as the library has them, or recomputed activations.

    python benchmarks/logits_in_pieces.py --processor_time          # about 5 minutes on an idle CPU core
    python benchmarks/logits_in_pieces.py --families llama --batch_size 4 --processor_time     # 128,256 entries

One step of the logit stage (both models' forward, KL divergence of the rows that count, backward, clipping, AdamW) of a
masked language model, where some rows count, and of a causal one, where all do:

* whole: the logits of all rows at once;
* chunks: `sum_over_chunks`, which takes a chunk's gradients as soon as its logits are there;
* recomputed: `torch.utils.checkpoint` around the same chunks' heads and loss, so that both heads run twice;
* student's only: the same, but the teacher's logits are whole, so that only the student's head runs twice.

All four share weights, batch and dropout masks, and take turns; their gradients must agree.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from stage_cost import PeakMemory, machine
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, HfArgumentParser

from hf_curriculum_distill.cost import flop_counter
from hf_curriculum_distill.layers.chunks import Losses, RowLogits, sum_over_chunks
from hf_curriculum_distill.layers.forward import PartialForward
from hf_curriculum_distill.losses import kl_divergence

# the entries of each family's vocabulary, and what recomputation may cost of a step to be worth its simplicity
VOCABULARIES = {"bert": 30_522, "gpt2": 50_257, "llama": 128_256}
LIMITS = {"bert": 1.03, "gpt2": 1.06, "llama": 1.06}


@dataclass
class Options:
    families: list[str] = field(
        default_factory=lambda: ["bert", "gpt2"], metadata={"help": f"Which of {', '.join(VOCABULARIES)}."}
    )
    teacher_layers: int = field(default=12, metadata={"help": "Blocks of the teacher."})
    teacher_hidden_size: int = field(default=768, metadata={"help": "Width of the teacher; 64 units a head."})
    student_layers: int = field(default=6, metadata={"help": "Blocks of the student."})
    student_hidden_size: int = field(default=512, metadata={"help": "Width of the student; 64 units a head."})
    vocab_size: int | None = field(default=None, metadata={"help": "Entries of the vocabulary; default: the family's."})
    batch_size: int = field(default=8, metadata={"help": "Sequences a step."})
    sequence_length: int = field(default=128, metadata={"help": "Tokens a sequence; none is padding."})
    masked_share: float = field(default=0.15, metadata={"help": "Share of a masked model's tokens with a label."})
    chunk_size: int = field(
        default=96, metadata={"help": "The most rows of logits at a time; the default is the library's on a CPU."}
    )
    repeats: int = field(default=5, metadata={"help": "Turns of one step that each way gets."})
    bf16: bool = field(default=False, metadata={"help": "Whether to run the models under bfloat16 autocast."})
    processor_time: bool = field(
        default=False,
        metadata={"help": "CPU only: one thread, timed by what it computed; for machines that others use meanwhile."},
    )
    use_cpu: bool = field(default=False, metadata={"help": "Whether to stay on the CPU where there is a GPU."})

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() and not self.use_cpu else "cpu")


def sum_recomputed(losses_of: Callable[[Tensor, slice], Losses], logits: RowLogits) -> Losses:
    """As [`sum_over_chunks`], by recomputation: nothing is kept of a chunk but the rows that its head reads."""

    def losses_of_chunk(hidden: Tensor, rows: slice) -> Losses:
        return losses_of(logits.head(hidden), rows)

    total, terms = 0.0, {}
    for rows in logits.chunks():
        part, parts = checkpoint(losses_of_chunk, logits.hidden[rows], rows, use_reentrant=False)
        total = total + part
        terms = {name: terms.get(name, 0.0) + value.detach() for name, value in parts.items()}
    return total, terms


@dataclass
class Way:
    """One way to hold logits, and what it was measured to cost."""

    name: str
    student_in_chunks: bool
    teacher_in_chunks: bool
    sum_over_rows: Callable[[Callable, Tensor | RowLogits], Losses]
    seconds: list[float] = field(default_factory=list)
    flops: int = 0
    bytes: int = 0
    error: float = 0.0  # of all gradients, relative to their norm


class LogitStage:
    """A student, its teacher and a batch of random tokens."""

    def __init__(self, options: Options, family: str):
        device, self.options = options.device, options
        self.student = build(options, family, options.student_layers, options.student_hidden_size).to(device).train()
        teacher = build(options, family, options.teacher_layers, options.teacher_hidden_size).to(device).eval()
        self.run_student, self.run_teacher = PartialForward(self.student), PartialForward(teacher.requires_grad_(False))
        # without a learning rate: the same work, and every way finds the same weights
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=0.0, fused=True)
        shape = options.batch_size, options.sequence_length
        self.input_ids = torch.randint(self.student.config.vocab_size, shape, device=device)
        numbers = torch.arange(self.input_ids.numel(), device=device)
        if family == "bert":
            num_rows = max(1, round(options.masked_share * len(numbers)))
            self.rows = numbers[torch.randperm(len(numbers), device=device)[:num_rows]].sort().values
        else:
            self.rows = numbers.view(shape)[:, :-1].flatten()  # nothing follows the last token

    def backward(self, way: Way) -> None:
        options, inputs = self.options, {"input_ids": self.input_ids}
        torch.manual_seed(0)  # the same dropout masks for every way

        def run(forward: PartialForward, in_chunks: bool, reduce: Callable | None = None):
            with torch.autocast(options.device.type, torch.bfloat16, enabled=options.bf16):
                size = options.chunk_size if in_chunks else None
                _, logits = forward(forward.model, inputs, logits=True, rows=self.rows, chunk_size=size, reduce=reduce)
            return logits

        with torch.no_grad():
            target = run(self.run_teacher, way.teacher_in_chunks)

        def losses_of(logits: Tensor, rows: slice) -> Losses:
            divergence = kl_divergence(logits, target[rows])
            return divergence, {"kl": divergence}

        total, _ = run(self.run_student, way.student_in_chunks, lambda logits, _: way.sum_over_rows(losses_of, logits))
        (total / len(self.rows)).backward()

    def update(self) -> None:
        clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.student.parameters() if parameter.grad is not None]


def build(options: Options, family: str, layers: int, width: int):
    config = AutoConfig.for_model(
        family,
        vocab_size=options.vocab_size or VOCABULARIES[family],
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 64),
        intermediate_size=4 * width,
        max_position_embeddings=max(512, options.sequence_length),
        tie_word_embeddings=True,
        use_cache=False,
    )
    return (AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM).from_config(config)


def measure(stage: LogitStage, options: Options, bar: tqdm) -> list[Way]:
    ways = [
        Way("whole", False, False, sum_over_chunks),
        Way("chunks", True, True, sum_over_chunks),
        Way("recomputed", True, True, sum_recomputed),
        Way("student's only", True, False, sum_recomputed),
    ]
    expected = None
    for way in ways:  # operations and gradients, which warms up, too
        with flop_counter() as counter:
            stage.backward(way)
        way.flops = counter.get_total_flops()
        found = stage.gradients()
        expected = [gradient.clone() for gradient in found] if expected is None else expected
        differences = torch.stack([(one - other).norm() for one, other in zip(found, expected, strict=True)])
        way.error = (differences.norm() / torch.stack([gradient.norm() for gradient in expected]).norm()).item()
        if not way.error < (2**-6 if options.bf16 else 1e-4):
            raise RuntimeError(f"The gradients of {way.name!r} differ by {way.error:.1e} of their norm.")
        stage.update()
        bar.update()
    del expected
    for way in ways:
        memory = PeakMemory(options.device)
        with memory:
            stage.backward(way)
        way.bytes = memory.bytes
        stage.update()
        bar.update()
    clock = time.process_time if options.processor_time else time.perf_counter
    for turn in range(options.repeats):
        for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:  # nobody always comes after the same one
            synchronize(options.device)
            start = clock()
            stage.backward(way)
            stage.update()
            synchronize(options.device)
            way.seconds.append(clock() - start)
            bar.update()
    return ways


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def report(family: str, vocab_size: int, num_rows: int, ways: list[Way]) -> None:
    _, chunks, *_ = ways
    print(f"\n{family}: {num_rows} rows of {vocab_size:,} logits; recomputation pays up to {LIMITS[family]:.2f}\n")
    columns = ["logits", "ms a step", "time / chunks, median", "least", "GFLOP", "GFLOP / chunks", "peak MiB"]
    columns += ["gradients differ by"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for way in ways:
        ratios = [own / other for own, other in zip(way.seconds, chunks.seconds, strict=True)]
        cells = [way.name, f"{1000 * statistics.median(way.seconds):,.0f}", f"{statistics.median(ratios):.3f}"]
        cells += [f"{min(ratios):.3f}", f"{way.flops / 1e9:,.1f}", f"{way.flops / chunks.flops:.3f}"]
        print("| " + " | ".join([*cells, f"{way.bytes / 2**20:,.0f}", f"{way.error:.0e}"]) + " |")


def main() -> None:
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the memory profiler announces each start and stop
    if options.processor_time:
        torch.set_num_threads(1)
    print(machine(options))
    with tqdm(total=len(options.families) * 4 * (options.repeats + 2), leave=False) as bar:
        for family in options.families:
            bar.set_description(family)
            torch.manual_seed(0)
            stage = LogitStage(options, family)
            ways = measure(stage, options, bar)
            report(family, stage.student.config.vocab_size, len(stage.rows), ways)


if __name__ == "__main__":
    main()
