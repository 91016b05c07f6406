"""Train every stage with BATCH examples a process, on any number of processes; write logs and weights to a folder.

Run by test_distributed.py: torchrun --nproc_per_node N tests/two_processes.py FOLDER BATCH ACCUMULATION
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM, set_seed

from hf_curriculum_distill import CURRICULUM_EXTRACTION, CurriculumDistillationConfig, CurriculumDistillationTrainer

STAGES = [
    {"hidden": [[1, 2]], "until": 2},
    {"hidden": [[1, 2], [2, 4]], "until": 4},
    {"kl_weight": 1.0, "label_weight": 0.5, "hidden": [[2, 4]], "until": 6},
    {"kl_weight": 1.0},
]
ONE_BY_ONE = [{"hidden": [[1, 2]], "until": 2}, {"hidden": [[2, 4]], "until": 4}, {"kl_weight": 1.0}]
ONLINE = {"method": "online", "label_loss_weight": 0.5, "teacher_learning_rate": 2e-3, "max_grad_norm": 0.5}
ONLINE |= {"lr_scheduler_type": "cosine"}
FROZEN_EMBEDDINGS = {"freeze_embeddings_in_layer_stages": True}
SAVED = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 4}  # saved between two logs
EPOCHS = {"stages": STAGES, "max_steps": -1, "num_train_epochs": 4}  # two steps each


def bert(layers, hidden, seed):
    set_seed(seed)
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": 2 * hidden}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForMaskedLM(BertConfig(vocab_size=64, num_attention_heads=2, **sizes, **no_dropout))


def example(index):
    """Rows that count, and padding, differ from example to example."""
    generator = torch.Generator().manual_seed(index)
    ids = torch.randint(4, 64, (12,), generator=generator)
    counted = torch.rand(12, generator=generator) < 0.1 + 0.05 * (index % 8)
    counted[0] = True
    mask = torch.arange(12) < 12 - index % 5
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": torch.where(counted & mask, ids, -100)}


def unlabelled(index):
    return example(index) | {"labels": torch.full((12,), -100)}


def main():
    folder, batch, accumulation = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    processes = PartialState(cpu=True)
    data = [example(index) for index in range(30)]

    def run(name, data=data[:16], checkpoint=None, teacher=None, **fields):
        train(folder / name, batch, accumulation, data, checkpoint, teacher, **fields)

    run("", stages=STAGES)
    run("checkpointed", stages=STAGES, gradient_checkpointing=True)
    run("chunks", stages=STAGES, logit_chunk_size=3)
    run("pca", stages=STAGES, projection="pca")
    run("block", stages=ONE_BY_ONE, train_prefix="block", freeze_matched_layers=True)

    run("slowed", stages=ONE_BY_ONE, finished_layer_rate=0.3, carry_optimizer=False, **FROZEN_EMBEDDINGS)
    run("independent", stages=STAGES[1:], train_prefix="independent", **FROZEN_EMBEDDINGS)

    run("measured", layer_order="complexity", calibration_samples=12)

    teachers = folder / "teachers"
    if processes.is_main_process:
        for step in (3, 5, 8):
            bert(4, 16, seed=step).save_pretrained(teachers / f"checkpoint-{step}")
    processes.wait_for_everyone()
    run("progressive", method="progressive", teacher=teachers)

    # the eight examples that the second of two processes gets first have no labels
    some_unlabelled = data[:8] + [unlabelled(index) for index in range(8, 16)] + data[16:27]
    # not evaluated: with even_batches off Trainer's own evaluation waits for ever for a process that has no batch
    run("uneven", some_unlabelled, accelerator_config={"even_batches": False}, eval_strategy="no", **EPOCHS)
    # accelerate's default makes all processes' batches equally large: it takes examples from the start once more
    padded = data[:29] if processes.num_processes > 1 else data[:29] + data[:3]
    run("padded", padded, standardize_targets=False, **EPOCHS)

    run("online", **SAVED, **ONLINE)
    run("online resumed", checkpoint=folder / "online" / "checkpoint-3", **SAVED, **ONLINE)
    run("saved", stages=STAGES, **SAVED)
    run("saved resumed", checkpoint=folder / "saved" / "checkpoint-3", stages=STAGES, **SAVED)
    # in the middle of the second epoch; accelerate does not tell this sampler the epoch where it skips batches
    balanced = {**EPOCHS, **SAVED, "train_sampling_strategy": "batch_rebalance"}
    run("balanced", data, **balanced)
    run("balanced resumed", data, checkpoint=folder / "balanced" / "checkpoint-3", **balanced)
    processes.wait_for_everyone()
    os._exit(0)  # see sharded.py


def train(folder, batch, accumulation, data, checkpoint, teacher, **fields):
    args = CurriculumDistillationConfig(
        output_dir=str(folder), per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation, per_device_eval_batch_size=3, report_to="none",
        use_cpu=True, learning_rate=1e-3, weight_decay=0.1, disable_tqdm=True, eval_steps=8,
        **{"max_steps": 8, "save_strategy": "no", "eval_strategy": "steps", "logging_steps": 1}
        | {"train_sampling_strategy": "sequential"} | CURRICULUM_EXTRACTION | fields,
    )  # fmt: skip
    student, teacher = bert(2, 8, seed=1), teacher or bert(4, 16, seed=2)
    trainer = CurriculumDistillationTrainer(
        model=student, args=args, train_dataset=data, eval_dataset=data[:7], teacher_model=teacher
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    if args.should_save:  # as many scripts do: saving must not wait for the other processes
        trainer.save_model()
        (folder / "history.json").write_text(json.dumps(trainer.state.log_history))
    if args.method == "online":  # every process trains it
        save_file(dict(teacher.named_parameters()), folder / f"teacher_{args.process_index}.safetensors")


if __name__ == "__main__":
    main()
