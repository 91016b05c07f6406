"""Train every stage under DeepSpeed ZeRO, or without it; write logs and weights to a folder.

Run by test_deepspeed.py: DS_ACCELERATOR=cpu torchrun --nproc_per_node 2 tests/zero.py FOLDER [ZERO_STAGE]

SGD, because ZeRO counts Adam's steps for all parameters together: a block's first step is no first step there.
"""

import json
import os
import sys
from pathlib import Path

import deepspeed
import torch
from accelerate import PartialState
from transformers import TrainerCallback
from two_processes import STAGES, bert, example

from hf_curriculum_distill import CURRICULUM_EXTRACTION, CurriculumDistillationConfig, CurriculumDistillationTrainer

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would compile an extension for minutes

PLAIN = {"stages": STAGES, "weight_decay": 0.0}
ONLINE = {"method": "online", "label_loss_weight": 0.5, "weight_decay": 0.0}


def parameters(model):
    named = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):  # whole ones pass through
        return {name.removeprefix("module."): parameter.detach().clone() for name, parameter in named.items()}


class Moved(TrainerCallback):
    """Which parameters each step changed."""

    def __init__(self):
        self.names = []

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.before = parameters(model)

    def on_step_end(self, args, state, control, model, **kwargs):
        after = parameters(model)
        self.names.append([name for name in after if not torch.equal(after[name], self.before[name])])


def train(folder, batch, accumulation, zero=None, checkpoint=None, **fields):
    """One training; without `zero` on one process and without DeepSpeed."""
    if zero is not None:
        automatic = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        fields["deepspeed"] = dict.fromkeys((*automatic, "gradient_clipping"), "auto")
        fields["deepspeed"] |= {
            "zero_optimization": {"stage": zero, "stage3_gather_16bit_weights_on_model_save": True},
            "zero_allow_untested_optimizer": True,
        }
    data = [example(index) for index in range(16)]
    args = CurriculumDistillationConfig(
        str(folder), max_steps=8, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=3, logging_steps=1, report_to="none", use_cpu=True, optim="sgd", learning_rate=0.05,
        train_sampling_strategy="sequential", disable_tqdm=True, eval_strategy="steps", eval_steps=4,
        save_strategy="steps", save_steps=3, **CURRICULUM_EXTRACTION | fields,
    )  # fmt: skip
    student, teacher, moved = bert(2, 8, seed=1), bert(4, 16, seed=2), Moved()
    taught = parameters(teacher)
    trainer = CurriculumDistillationTrainer(
        model=student, args=args, train_dataset=data, eval_dataset=data[:7], teacher_model=teacher, callbacks=[moved]
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()  # on every process: ZeRO-3 gathers the weights
    if args.should_save:
        same = all(torch.equal(tensor, taught[name]) for name, tensor in parameters(teacher).items())
        run = {"history": trainer.state.log_history, "moved": moved.names, "teacher_unchanged": same}
        (folder / "run.json").write_text(json.dumps(run))


def main():
    folder = Path(sys.argv[1])
    zero, batch = (int(sys.argv[2]), 8) if len(sys.argv) > 2 else (None, 16)
    train(folder / "plain", batch, 1, zero, **PLAIN)
    train(folder / "online", batch, 1, zero, **ONLINE)
    if zero is not None:
        refusal = None
        try:
            train(folder / "decayed", batch, 1, zero, stages=STAGES, weight_decay=0.1)
        except ValueError as error:
            refusal = str(error)
        (folder / "refusal.txt").write_text(refusal or "none")
        train(folder / "accumulated", 2, 4, zero, **PLAIN)
        train(folder / "whole forward", batch, 1, zero, truncate=False, **PLAIN)
        train(folder / "resumed", batch, 1, zero, checkpoint=str(folder / "plain" / "checkpoint-3"), **PLAIN)
    PartialState().wait_for_everyone()
    os._exit(0)  # see sharded.py


if __name__ == "__main__":
    main()
