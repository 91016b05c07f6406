"""Train every stage on so many examples a step, on however many processes; write logs and weights to a folder.

Run by test_distributed.py: torchrun --nproc_per_node N tests/two_processes.py FOLDER BATCH ACCUMULATION
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM, set_seed

from hf_curriculum_distill import CurriculumDistillationConfig, CurriculumDistillationTrainer

STAGES = [
    {"hidden": [[1, 2]], "until": 2},
    {"hidden": [[1, 2], [2, 4]], "until": 4},
    {"kl_weight": 1.0, "label_weight": 0.5, "hidden": [[2, 4]], "until": 6},
    {"kl_weight": 1.0},
]
ONLINE = {"method": "online", "label_loss_weight": 0.5, "teacher_learning_rate": 2e-3, "max_grad_norm": 0.5}
ONLINE |= {"lr_scheduler_type": "cosine", "save_strategy": "steps", "save_steps": 4}


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


def main():
    folder, batch, accumulation = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    train(folder, batch, accumulation, stages=STAGES)
    train(folder / "online", batch, accumulation, **ONLINE)
    train(folder / "resumed", batch, accumulation, folder / "online" / "checkpoint-4", **ONLINE)


def train(folder, batch, accumulation, checkpoint=None, **fields):
    data = [example(index) for index in range(20)]
    args = CurriculumDistillationConfig(
        output_dir=str(folder), max_steps=8, per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation, per_device_eval_batch_size=3, logging_steps=1, report_to="none",
        use_cpu=True, learning_rate=1e-3, weight_decay=0.1, train_sampling_strategy="sequential",
        disable_tqdm=True, eval_strategy="steps", eval_steps=8,
        **{"save_strategy": "no"} | fields,
    )  # fmt: skip
    student, teacher = bert(2, 8, seed=1), bert(4, 16, seed=2)
    trainer = CurriculumDistillationTrainer(
        model=student, args=args, train_dataset=data[:16], eval_dataset=data[:7], teacher_model=teacher
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    if args.should_save:  # as many scripts do: saving must not wait for the other processes
        trainer.save_model()
        (folder / "history.json").write_text(json.dumps(trainer.state.log_history))
    if args.method == "online":  # every process trains it
        save_file(dict(teacher.named_parameters()), folder / f"teacher_{args.process_index}.safetensors")


if __name__ == "__main__":
    main()
