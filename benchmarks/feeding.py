"""Tokens a second that packed blocks on disk give a trainer, beside those that a device would train on.

    python benchmarks/feeding.py                       # about 2 minutes; needs as many idle cores as workers

Read from disk (memory-mapped), shuffled, masked and collated as in `recipes/bert_large.py`; nothing is trained. What a
device needs follows from the plan of BERT-large to a 6-layer BERT-base and a rate of operations, which is given: the
default is half of the 989 TFLOP/s that an H100's data sheet says for dense bfloat16.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from stage_cost import machine
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, HfArgumentParser

from hf_curriculum_distill import CURRICULUM_EXTRACTION, CurriculumDistillationConfig, CurriculumDistillationTrainer
from hf_curriculum_distill.batches.seeding import seeded
from hf_curriculum_distill.planning import PlanArguments, make_plan
from hf_curriculum_distill.tasks.text import MaskedBlocksCollator

TOKENIZER = Path(__file__).parents[1] / "recipes/data/bert_uncased"


@dataclass
class Options:
    block_sizes: list[int] = field(default_factory=lambda: [128, 512], metadata={"help": "Tokens a block."})
    workers: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Processes that load; 0: none."})
    batch_tokens: int = field(default=16_384, metadata={"help": "Tokens a batch."})
    batches: int = field(default=200, metadata={"help": "Timed batches of a turn."})
    repeats: int = field(default=3, metadata={"help": "Turns; the table has their median."})
    flops_per_second: float = field(default=4.945e14, metadata={"help": "Operations a second of the device to feed."})


def main() -> None:
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    delivered = {}
    with tempfile.TemporaryDirectory() as folder:
        for block_size in options.block_sizes:
            blocks = write_blocks(f"{folder}/{block_size}", block_size, options, tokenizer)
            for num_workers in options.workers:
                args = CurriculumDistillationConfig(
                    f"{folder}/run",
                    stages=[{"label_weight": 1.0}],
                    per_device_train_batch_size=options.batch_tokens // block_size,
                    dataloader_num_workers=num_workers,
                    report_to="none",
                    use_cpu=True,
                )
                sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
                trainer = CurriculumDistillationTrainer(
                    BertForMaskedLM(BertConfig(**sizes)),
                    args,
                    train_dataset=blocks,
                    data_collator=MaskedBlocksCollator(tokenizer, fixed_count=True),
                )
                turns = [tokens_per_second(trainer, turn, options) for turn in range(options.repeats)]
                delivered[block_size, num_workers] = statistics.median(turns)
    print(machine(args))
    print(f"\nmillions of tokens a second\n\n| | {' | '.join(f'blocks of {size}' for size in options.block_sizes)} |")
    print("|---" * (1 + len(options.block_sizes)) + "|")
    for num_workers in options.workers:
        row = (f"{delivered[size, num_workers] / 1e6:.3g}" for size in options.block_sizes)
        print(f"| delivered, {num_workers} worker(s) | {' | '.join(row)} |")
    needs = [needed(size, options) for size in options.block_sizes]
    for stage in needs[0]:
        print(f"| needed, {stage} | {' | '.join(f'{need[stage] / 1e6:.3g}' for need in needs)} |")


def write_blocks(folder: str, block_size: int, options: Options, tokenizer) -> Dataset:
    """Random blocks, as many as a turn reads and its loaders read ahead, on disk."""
    count = (options.batches + 20) * (options.batch_tokens // block_size)
    ids = np.random.default_rng(0).integers(1000, len(tokenizer), (count, block_size), dtype=np.int32)
    ids[:, 0], ids[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    Dataset.from_dict({"input_ids": ids}).save_to_disk(folder)
    return load_from_disk(folder)


def tokens_per_second(trainer: CurriculumDistillationTrainer, epoch: int, options: Options) -> float:
    loader = trainer.get_train_dataloader()
    with seeded(loader, epoch):
        batches = iter(loader)
        next(batches)  # by now the workers are there
        start = time.perf_counter()
        num_tokens = sum(batch["input_ids"].numel() for batch in itertools.islice(batches, options.batches))
        return num_tokens / (time.perf_counter() - start)


def needed(block_size: int, options: Options) -> dict[str, float]:
    """Tokens a second that the device gets through in each stage."""
    batch_size = options.batch_tokens // block_size
    args = CurriculumDistillationConfig(
        "unused",
        **CURRICULUM_EXTRACTION,
        max_steps=100,
        per_device_train_batch_size=batch_size,
        bf16=True,
        use_cpu=True,
        report_to="none",
    )
    run = {"student": "bert-6-768", "teacher": "bert-large", "block_size": block_size}
    plan = make_plan(PlanArguments(**run, flops_per_second=options.flops_per_second), args)
    steps = {row["name"]: row["last_step"] - row["first_step"] + 1 for row in plan.stages}
    return {row["name"]: steps[row["name"]] * options.batch_tokens / row["seconds"] for row in plan.stages}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
