"""What blocks beyond a stage cost under DistributedDataParallel, and what it would cost to leave them out.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 benchmarks/unused_parameters.py     # about 2 minutes on 2 CPU cores
    torchrun --nproc_per_node 8 benchmarks/unused_parameters.py --layers 12 --hidden_size 768 --vocab_size 30522 \
        --batch_size 32 --sequence_length 512                                         # the GPUs of one machine

A student's steps in each stage (prefix, loss, backward pass with its reduction over processes, clipping, AdamW; no
teacher), four ways that take turns on equal weights and batches; their gradient norms must agree:

    searched   DDP(find_unused_parameters=True), wrapped once: what the library's configuration sets
    skipping   the same with a communication hook that leaves out buckets in which the stage trains nothing
    re-wrapped requires_grad=False beyond the stage and a new DDP at its start
    static     DDP(static_graph=True), a new one at the stage's start
"""

from __future__ import annotations

import copy
import os
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from stage_cost import machine
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from transformers import BertConfig, BertForMaskedLM, HfArgumentParser
from transformers.utils import logging

from hf_curriculum_distill import losses
from hf_curriculum_distill.hidden_losses import hidden_state_mse
from hf_curriculum_distill.layers.forward import PartialForward

WAYS = ("searched", "skipping", "re-wrapped", "static")


@dataclass
class Options:
    layers: int = field(default=6, metadata={"help": "Blocks of the student."})
    hidden_size: int = field(default=256, metadata={"help": "Its width; 64 units a head."})
    vocab_size: int = field(default=8192, metadata={"help": "Entries of the vocabulary."})
    batch_size: int = field(default=8, metadata={"help": "Sequences a step and process."})
    sequence_length: int = field(default=64, metadata={"help": "Tokens a sequence."})
    masked_share: float = field(
        default=0.15, metadata={"help": "Share of the tokens whose logits the logit stage compares."}
    )
    bucket_cap_mb: float = field(
        default=3, metadata={"help": "Largest bucket of gradients: 3 is a block of this student, 25 one of BERT-base."}
    )
    steps: int = field(default=3, metadata={"help": "Timed steps a turn."})
    repeats: int = field(default=5, metadata={"help": "Turns each way gets; ratios are medians over turns."})


class Way:
    """A student of its own, and how it is wrapped in a stage."""

    def __init__(self, name: str, student: nn.Module, options: Options, device: torch.device):
        self.name, self.student, self.device = name, copy.deepcopy(student), device
        self.forward = PartialForward(self.student)
        self.cap = {"bucket_cap_mb": options.bucket_cap_mb, "device_ids": [device] if device.type == "cuda" else None}
        self.model, self.reduced = None, 0

    def enter(self, layer: int) -> None:
        """Wrap for a stage that stops after this block; 0 is the logit stage, which trains everything."""
        beyond = [p for block in self.forward.blocks[layer:] for p in block.parameters()] if layer else []
        beyond += self.head() if layer else []
        self.unused = {id(parameter) for parameter in beyond}
        for parameter in self.student.parameters():
            parameter.requires_grad_(not (self.name == "re-wrapped" and id(parameter) in self.unused))
        start = time.perf_counter()
        once = self.name in ("searched", "skipping")
        if not once or self.model is None:
            self.model = None  # first the old one's buckets go
            how = {"find_unused_parameters": once, "static_graph": self.name == "static"}
            self.model = DistributedDataParallel(self.student, **how, **self.cap)
            self.model.register_comm_hook(None, self.reduce)
        self.wrapping = time.perf_counter() - start
        self.optimizer = torch.optim.AdamW([p for p in self.student.parameters() if p.requires_grad], lr=1e-4)

    def head(self) -> list[nn.Parameter]:
        backbone = {id(parameter) for parameter in self.student.base_model.parameters()}
        return [parameter for parameter in self.student.parameters() if id(parameter) not in backbone]

    def reduce(self, state, bucket):
        """What DDP does by itself, counted."""
        if self.name != "skipping" or any(id(parameter) not in self.unused for parameter in bucket.parameters()):
            self.reduced += bucket.buffer().nbytes
            return allreduce_hook(None, bucket)
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    def steps(self, batches: list[dict[str, torch.Tensor]], layer: int) -> list[float]:
        """Gradient norms."""
        norms = []
        for batch in batches:
            rows, targets = batch["rows"], batch["targets"]
            self.reduced = 0
            kwargs = {"layers": (layer,)} if layer else {"logits": True, "rows": rows}
            hidden, logits = self.forward(self.model, {"input_ids": batch["input_ids"]}, **kwargs)
            if layer:
                loss = hidden_state_mse(hidden[layer], targets) / targets[..., 0].numel()
            else:
                loss = losses.cross_entropy(logits, batch["input_ids"].flatten()[rows]) / len(rows)
            loss.backward()
            norms.append(clip_grad_norm_(self.student.parameters(), 1.0).item())
            self.optimizer.step()
            self.optimizer.zero_grad()
        return norms


def measure(ways: list[Way], layer: int, batches: list, options: Options) -> np.ndarray:
    """Milliseconds a step `[turns, ways]`; the first turn, which warms up and builds buckets, is only checked."""
    turns = []
    for turn in range(options.repeats + 1):
        seconds, norms = [], []
        for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:  # nobody is always first
            dist.barrier()
            start = time.perf_counter()
            norms.append(way.steps(batches, layer))  # reading the norms waits for the device
            seconds.append((WAYS.index(way.name), time.perf_counter() - start))
        if not np.allclose(norms, norms[0], rtol=1e-3):
            raise RuntimeError(f"The gradient norms of the ways differ: {norms}")
        turns.append([1000 * spent / len(batches) for _, spent in sorted(seconds)])
    return np.array(turns[1:])


def main() -> None:
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    if "RANK" not in os.environ:
        raise SystemExit("This measures several processes: torchrun --nproc_per_node 2 benchmarks/unused_parameters.py")
    logging.set_verbosity_error()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.hidden_size // 64),
        intermediate_size=4 * options.hidden_size,
        max_position_embeddings=max(512, options.sequence_length),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    student = BertForMaskedLM(config).to(device)
    batches, shape = [], (options.batch_size, options.sequence_length)
    torch.manual_seed(dist.get_rank())
    for _ in range(options.steps):
        ids = torch.randint(options.vocab_size, shape, device=device)
        rows = (torch.rand(ids.numel(), device=device) < options.masked_share).nonzero().squeeze(1)
        targets = torch.randn(*shape, options.hidden_size, device=device)
        batches.append({"input_ids": ids, "rows": rows, "targets": targets})
    ways = [Way(name, student, options, device) for name in WAYS]
    first = dist.get_rank() == 0
    if first:
        size = sum(parameter.nbytes for parameter in student.parameters()) / 2**20
        where = machine(SimpleNamespace(device=device))
        print(f"{where}, {dist.get_world_size()} processes, {size:.1f} MiB of parameters")
        print(
            f"\n{'':10}|{'time against searched':^36}|{'ms a step':^44}|{'MiB reduced a step':^44}|{'ms to wrap':>11}"
        )
        names = "".join(f"{name:>11}" for name in WAYS)
        print(f"{'stage':10}|" + "".join(f"{name:>12}" for name in WAYS[1:]) + f"|{names}|{names}|{WAYS[2]:>11}")
    for layer in [*sorted({1, (options.layers + 1) // 2, options.layers}), 0]:
        for way in ways:
            way.student.load_state_dict(student.state_dict())
            way.enter(layer)
        turns = measure(ways, layer, batches, options)
        if first:
            ratios = np.median(turns / turns[:, :1], axis=0)
            line = f"{f'layer {layer}' if layer else 'kl':10}|" + "".join(f"{ratio:12.3f}" for ratio in ratios[1:])
            line += "|" + "".join(f"{ms:11.1f}" for ms in np.median(turns, axis=0))
            line += "|" + "".join(f"{way.reduced / 2**20:11.1f}" for way in ways)
            print(line + f"|{1000 * ways[2].wrapping:11.1f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
