"""Train every stage on a student sharded by FSDP2 over two processes, and on a whole one; write losses and weights.

Run by test_fsdp.py: torchrun --nproc_per_node 2 tests/sharded.py FOLDER

Without Trainer, because accelerate shards nothing on a CPU; the loop does what Trainer does on a GPU.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import yaml
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import default_collate
from transformers import GPT2Config, GPT2LMHeadModel, set_seed
from two_processes import STAGES, bert, example

from hf_curriculum_distill import CurriculumDistillationConfig, ProjectionBank, Stage
from hf_curriculum_distill.batches import BatchReader
from hf_curriculum_distill.cost import stage_flops
from hf_curriculum_distill.layers import PartialForward
from hf_curriculum_distill.objective import Objective
from hf_curriculum_distill.teachers import Targets, Teacher

ROOT = Path(__file__).parents[1]
EXAMPLES, STEPS_A_STAGE = 16, 2


def shard(model, mesh):
    for block in PartialForward(model).blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def shard_as_accelerate(model, mesh):
    """What Trainer has done on a GPU, with the settings of recipes/accelerate/fsdp2.yaml."""
    config = yaml.safe_load((ROOT / "recipes" / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"]
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=config["fsdp_version"],
        auto_wrap_policy=config["fsdp_auto_wrap_policy"].lower(),
        reshard_after_forward=config["fsdp_reshard_after_forward"],
        state_dict_type=config["fsdp_state_dict_type"],
        cpu_offload=config["fsdp_offload_params"],
        cpu_ram_efficient_loading=False,
    )
    fsdp2_prepare_model(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no"), model)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gpt2():
    set_seed(1)
    sizes = {"vocab_size": 64, "n_layer": 2, "n_embd": 8, "n_head": 2, "n_positions": 16}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, bos_token_id=1, eos_token_id=2, use_cache=False))


def train(
    folder, accumulation, mesh=None, student=None, shard=shard, shard_teacher=False, frozen=None, checkpointing=False
):
    """Logs and weights of a training; on a mesh of processes each of them takes its share of every batch."""
    rank, processes = (0, 1) if mesh is None else (mesh.get_rank(), mesh.size())
    student, teacher = (student or bert(2, 8, seed=1)).train(), Teacher(bert(4, 16, seed=2))
    if checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    if mesh is not None:
        shard(student, mesh)
    if shard_teacher:
        shard(teacher.model, mesh)
    forward = PartialForward(student)  # finds the blocks; hooks them at its first call, which is after sharding
    teacher.prepare(ProjectionBank.create([(1, 2), (2, 4)], [8, 8], [16, 16]).freeze())
    args = CurriculumDistillationConfig(str(folder), use_cpu=True)
    read, objective = BatchReader(forward, teacher.partial_forward, args, whole_logits=True), Objective(forward, args)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.1)

    batch = [example(index) for index in range(EXAMPLES)]
    counts = read(default_collate(batch)).counts
    share = EXAMPLES // processes // accumulation
    micro_batches = [batch[i : i + share] for i in range(0, EXAMPLES, share)][rank::processes]
    history = []
    for stage in (Stage(**fields) for fields in STAGES):
        flops = np.sum(stage_flops(objective, teacher, read(default_collate(micro_batches[0])), stage))
        before = {name: whole(tensor).clone() for name, tensor in student.named_parameters()}
        for _ in range(STEPS_A_STAGE):
            total = 0.0
            for index, batch in enumerate(map(read, map(default_collate, micro_batches))):
                if mesh is not None:
                    student.set_requires_gradient_sync(index == len(micro_batches) - 1)
                targets = teacher.targets(batch, stage) if stage.needs_teacher else Targets()
                loss = objective(student, batch, stage, targets, counts, frozen if stage.needs_logits else None).total
                (loss * processes).backward()  # gradients are averaged over processes, the counts are of all
                total += loss.detach()
            if mesh is not None:
                dist.all_reduce(total)
            untouched = sorted(name for name, p in student.named_parameters() if p.grad is None)
            norm = whole(clip_grad_norm_(student.parameters(), 1.0))
            optimizer.step()
            optimizer.zero_grad()
            history.append({"stage": stage.name, "loss": total.item(), "norm": norm.item(), "untouched": untouched})
            history[-1]["flops"] = int(flops)
        after = {name: whole(tensor) for name, tensor in student.named_parameters()}
        history[-1]["unmoved"] = sorted(name for name in before if torch.equal(before[name], after[name]))
    weights = {name: tensor.detach().clone() for name, tensor in after.items()}
    if dist.get_rank() == 0:
        folder.mkdir()
        (folder / "history.json").write_text(json.dumps(history))
        save_file(weights, folder / "model.safetensors")


def main():
    folder = Path(sys.argv[1])
    mesh = init_device_mesh("cpu", (2,))
    train(folder / "whole", accumulation=1)
    train(folder / "sharded", 1, mesh)
    train(folder / "accumulated", 4, mesh)
    train(folder / "checkpointed", 2, mesh, checkpointing=True)
    train(folder / "sharded teacher", 2, mesh, shard_teacher=True)
    train(folder / "whole, frozen", 1, frozen=1)
    train(folder / "sharded, frozen", 2, mesh, frozen=1)
    train(folder / "whole GPT-2", 1, student=gpt2())
    train(folder / "GPT-2 sharded by accelerate", 2, mesh, gpt2(), shard=shard_as_accelerate)
    dist.barrier()
    os._exit(0)  # the process group and torch's threads have aborted, now and then, as they were taken down


if __name__ == "__main__":
    main()
