"""Record what short runs compute, to the bit: to show that a change changes no numbers.

    python tests/golden.py --output before.json
    python tests/golden.py --output after.json --compare before.json

Runs every method, and the curriculum in every layer order, with accumulation, chunks of logits, frozen layers, a
teacher cache, bf16 and two processes, on text, images and audio. Kept are losses, gradient norms and operations of
each step, evaluations, and a hash of the final weights. Numbers of two machines differ; compare on one.
"""

import copy
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field

import torch
from accelerate import PartialState
from architectures import ARCHITECTURES, build
from conftest import STUDENT_DEPTH, TEACHER_DEPTH, masked_lm_examples, tiny_bert
from test_families import examples, labelled
from tqdm import tqdm
from transformers import HfArgumentParser, PrinterCallback

from hf_curriculum_distill import (
    CURRICULUM_EXTRACTION,
    CurriculumDistillationConfig,
    CurriculumDistillationTrainer,
)
from hf_curriculum_distill.stages import LAYER_ORDERS

VARIANTS = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "label_loss_weight": 0.5},
    "cached": {"teacher_cache": "cache"},
    "block": {"train_prefix": "block"},
    "chunks": {"logit_chunk_size": 3, "label_loss_weight": 0.5},
    "auxiliary": {"hidden_weight_in_logit_stage": 0.3, "shared_projection": True, "hidden_positions": "labels"},
}
OTHERS = {
    "labels": {"method": "labels"},
    "labels, smooth": {"method": "labels", "label_smoothing_factor": 0.1},
    "online": {"method": "online", "label_loss_weight": 0.5, "teacher_learning_rate": 2e-3},
    "online, layers": {
        "method": "online",
        "standardize_targets": False,
        "stages": [{"hidden": [[1, 2]], "until": 4}, {"kl_weight": 1.0}],
    },
    "progressive": {"method": "progressive"},
    "frozen": {"freeze_matched_layers": True},
    "whole": {"truncate": False, "gradient_checkpointing": True},
    "bf16": {"bf16": True},
    "restarted": {"restart_schedule_per_stage": True, "layer_order": "cumulative"},
    "epochs": {"max_steps": -1, "num_train_epochs": 1, "dataloader_drop_last": True},
    "each process its mean": {"average_tokens_across_devices": False, "label_loss_weight": 0.5},
    "cached, whole logits": {"teacher_cache": "cache", "teacher_cache_logits": None},
    "reverse, warm": {"divergence": "reverse_kl", "temperature": 2.0, "method": "one_shot"},
}
ALSO_IN_TWO_PROCESSES = ("plain", "accumulated", "cached", "block", "online", "progressive", "each process its mean")
FAMILIES = ("llama", "gpt2", "t5", "bart", "whisper", "vit", "wav2vec2", "llama-classifier", "opt", "modernbert")
KEPT = ("stage", "loss", "grad_norm", "hidden_mse", "kl", "label_loss", "teacher_loss", "aux_loss")
KEPT += ("student_flops", "teacher_flops", "eval_loss", "eval_accuracy", "eval_agreement", "eval_kl")


@dataclass
class Arguments:
    output: str = field(metadata={"help": "File to write."})
    compare: str | None = field(default=None, metadata={"help": "File of an earlier recording, on this machine."})


def planned():
    """`name -> (settings, family)` of every run."""
    runs = {f"one_shot {n}": ({"method": "one_shot"} | VARIANTS[n], None) for n in ("plain", "cached", "chunks")}
    for order in LAYER_ORDERS[:-1]:  # "complexity" trains the stages of "sequential" in a measured order
        runs |= {f"{order} {n}": ({"layer_order": order} | fields, None) for n, fields in VARIANTS.items()}
    runs |= {name: (fields, None) for name, fields in OTHERS.items()}
    return runs | {family: ({"label_loss_weight": 0.5, "max_steps": 8}, family) for family in FAMILIES}


def run(folder, settings, family, state):
    settings = settings | {n: os.path.join(folder, settings[n]) for n in ("teacher_cache",) if n in settings}
    args = CurriculumDistillationConfig(
        output_dir=folder,
        **{"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1}
        | {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
        | CURRICULUM_EXTRACTION
        | settings,
    )
    if family is None:
        student, data = tiny_bert(STUDENT_DEPTH, seed=1, dropout=0.1), masked_lm_examples(64)
        teacher = tiny_bert(TEACHER_DEPTH, width=24, seed=2, initializer_range=0.3)
    else:
        model_class, config, *_ = ARCHITECTURES[family]
        torch.manual_seed(1)
        student = model_class(copy.deepcopy(config))
        torch.manual_seed(2)
        teacher = model_class(copy.deepcopy(config))
        data = labelled(student, examples(build(family)[2], 16))
    if args.method == "progressive":
        teacher = os.path.join(folder, "teacher")
        for step in (1, 2, 3) if state.is_main_process else ():
            checkpoint = tiny_bert(TEACHER_DEPTH, width=24, seed=1 + step, initializer_range=0.3)
            checkpoint.save_pretrained(os.path.join(teacher, f"checkpoint-{step}"))
        state.wait_for_everyone()
    trainer = CurriculumDistillationTrainer(
        model=student, args=args, train_dataset=data, eval_dataset=data[:8], teacher_model=teacher
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.evaluate()
    digest = hashlib.sha256()
    for parameter in student.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    logs = [{name: log[name] for name in KEPT if name in log} for log in trainer.state.log_history]
    return {"logs": logs, "weights": digest.hexdigest()}


def record(runs, folder, state):
    recorded = {}
    for name, (settings, family) in tqdm(runs.items(), disable=not state.is_main_process):
        recorded[name] = run(os.path.join(folder, name), settings, family, state)
    return recorded


def record_in_two_processes(folder):
    folder = os.path.join(folder, "two processes")
    os.mkdir(folder)
    path = os.path.join(folder, "recorded.json")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*command, __file__, "--output", path], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def differences(before, after):
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old == new:
            continue
        if old is None or new is None:
            yield f"{name}: only in the {'later' if old is None else 'earlier'} recording"
            continue
        if len(old["logs"]) != len(new["logs"]):
            yield f"{name}: {len(old['logs'])} logs before, {len(new['logs'])} after"
        for number, (one, other) in enumerate(zip(old["logs"], new["logs"], strict=False), start=1):
            for key in sorted(one.keys() | other.keys()):
                if one.get(key) != other.get(key):
                    yield f"{name}: log {number}: {key}: {one.get(key)} before, {other.get(key)} after"
        if old["weights"] != new["weights"]:
            yield f"{name}: other weights"


def main():
    (options,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    state, runs = PartialState(cpu=True), planned()
    if state.num_processes > 1:  # one folder for both
        runs = {name: one for name, one in runs.items() if name.endswith(ALSO_IN_TWO_PROCESSES)}
        recorded = record(runs, os.path.dirname(options.output), state)
    else:
        with tempfile.TemporaryDirectory() as folder:
            recorded = record(runs, folder, state)
            recorded |= {f"two processes: {n}": one for n, one in record_in_two_processes(folder).items()}
    if not state.is_main_process:
        return
    with open(options.output, "w", encoding="utf-8") as file:
        json.dump(recorded, file, indent=1)
    if options.compare is not None:
        with open(options.compare, encoding="utf-8") as file:
            found = list(differences(json.load(file), json.loads(json.dumps(recorded))))
        print("\n".join(found) or f"{len(recorded)} runs are equal to the bit")
        sys.exit(bool(found))


if __name__ == "__main__":
    main()
