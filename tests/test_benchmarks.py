"""Benchmarks run, and say what they measured; how fast is never asserted."""

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import assert_same_weights, weights

from hf_curriculum_distill import ProjectionBank, Stage
from hf_curriculum_distill.stages import StageScheduler

ROOT = Path(__file__).parents[1]
TINY = "--teacher_layers 4 --teacher_hidden_size 32 --student_layers 2 --student_hidden_size 24 --vocab_size 100 "
TINY += "--batch_size 2 --sequence_length 16 --steps 1 --repeats 1 --use_cpu"


def test_stage_cost_prints_every_stage_and_target():
    command = [sys.executable, "benchmarks/stage_cost.py", *TINY.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]  # the losses of all three ways agree, or it ends with an error
    rows = [line.split("|")[0].strip() for line in done.stdout.splitlines() if "|" in line]
    assert [row for row in rows if row.startswith(("layer", "kl", "half"))] == ["layer 1", "layer 2", "kl", "half-half"]
    assert sum("= " in line and ("<=" in line or ">=" in line) for line in done.stdout.splitlines()) == 4


def test_small_model_overhead_prints_both_stages_and_targets():
    sizes = "--dimension 8 --sparsity 2 --teacher_width 16 --student_width 8 --batch_size 4 --steps 3 --repeats 1"
    command = [sys.executable, "benchmarks/small_model_overhead.py", *sizes.split(), "--processor_time"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]  # the losses of all three ways agree, or it ends with an error
    rows = [line.split("|")[0].strip() for line in done.stdout.splitlines() if "|" in line]
    assert [row for row in rows if row] == ["stage", "layer 1", "kl"]
    assert sum("<=" in line for line in done.stdout.splitlines()) == 2


def test_peers_prints_every_stage_and_target_for_everyone_who_is_installed():
    sizes = "--teacher 4x32 --students 2x24 --vocab_size 100 --sequence_lengths 16 --batch_tokens 32 --repeats 1"
    command = [sys.executable, "benchmarks/peers.py", *sizes.split(), "--use_cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[
        -2000:
    ]  # the losses of who trains the same agree, or it ends with an error
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    in_stages = ["library", "library, block", "by hand", "Trainer", "Trainer, rows picked"]
    without = ["TextBrewer, logits_mask", "TextBrewer, quick start"] if find_spec("textbrewer") else []
    without += ["torchdistill"] if find_spec("torchdistill") else []
    for stage in ("layer 1", "layer 2", "layer stages", "kl (one-shot)", "half-and-half"):
        expected = in_stages + (without if stage in ("kl (one-shot)", "half-and-half") else [])
        assert [row[1] for row in cells if row[0] == stage] == expected
    assert sum(row[2][:2] in ("<=", ">=") for row in cells) == (8 if find_spec("textbrewer") else 6)


# torchdistill imports torchvision, of which a package index may lack the build that fits a torch for CPUs
@pytest.mark.parametrize("peer", ["TextBrewer"] + ["Torchdistill"] * bool(find_spec("torchdistill")))
def test_peers_train_on_logits_as_the_loop_by_hand_does(peer, config, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import peers
    from stage_cost import build

    args = config(max_steps=3, per_device_train_batch_size=2, optim="sgd", learning_rate=0.5)
    options = peers.Options(vocab_size=50)
    sizes = peers.Namespace(vocab_size=50, sequence_length=16)
    teacher = build(sizes, 3, 64).eval().requires_grad_(False)
    dataset = peers.masked_text(options, 6, 16)
    scheduler, bank = StageScheduler([Stage(kl_weight=1.0)], 3), ProjectionBank.create([], [], [])
    trained = []
    for make, given in (
        (peers.ByHand, {"train_dataset": dataset, "scheduler": scheduler, "bank": bank}),
        (getattr(peers, peer), {"train_dataset": [{"input_ids": e["input_ids"]} for e in dataset], "pairs": []}),
    ):
        torch.manual_seed(0)
        student = build(sizes, 2, 32)
        before = weights(student)
        probe = peers.Probe(time.perf_counter, args.device, {"kl": range(3)})
        probe.start(None)
        run = make(student, args, probe=probe, teacher=teacher, **given)
        run.temperature = 1.0
        run.train()
        trained.append(weights(student))
    assert not torch.equal(
        before["bert.embeddings.word_embeddings.weight"], trained[0]["bert.embeddings.word_embeddings.weight"]
    )
    assert_same_weights(trained[1], trained[0], rtol=1e-4, atol=1e-6)


def test_cache_prints_every_stage_and_the_target():
    sizes = "--teacher_layers 4 --teacher_hidden_size 32 --student_layers 2 --student_hidden_size 24 --vocab_size 100 "
    sizes += "--batch_size 2 --sequence_length 16 --batches 4 --epochs 3 --use_cpu"
    command = [sys.executable, "benchmarks/cache.py", *sizes.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]  # both caches train the same, or it ends with an error
    rows = [line.split("|")[0].strip() for line in done.stdout.splitlines() if "|" in line]
    assert rows == ["ms a step", "layer 1", "layer 2", "kl", "curriculum"]
    assert sum(">=" in line for line in done.stdout.splitlines()) == 1


def test_feeding_prints_what_is_delivered_and_what_each_stage_needs():
    sizes = "--block_sizes 16 32 --workers 0 1 --batch_tokens 64 --batches 3 --repeats 1"
    command = [sys.executable, "benchmarks/feeding.py", *sizes.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    stages = [*(f"layer {number}" for number in range(1, 7)), "kl"]
    expected = [f"delivered, {n} worker(s)" for n in (0, 1)] + [f"needed, {stage}" for stage in stages]
    assert [row[0] for row in cells[2:]] == expected
    assert all(float(value) > 0 for row in cells[2:] for value in row[1:])


def test_logits_in_pieces_prints_every_way_and_what_runs_twice(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import logits_in_pieces

    sizes = "--teacher_layers 2 --teacher_hidden_size 32 --student_layers 1 --student_hidden_size 24 --vocab_size 1000 "
    sizes += "--batch_size 2 --sequence_length 16 --chunk_size 4 --repeats 1 --use_cpu --families bert gpt2 llama"
    monkeypatch.setattr(sys, "argv", ["logits_in_pieces.py", *sizes.split()])
    monkeypatch.setenv("KINETO_LOG_LEVEL", "6")
    logits_in_pieces.main()  # the gradients of all four ways agree, or it ends with an error
    printed = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed if "|" in line]
    rows = [row for row in cells if row[0] not in ("logits", "---")]
    assert [row[0] for row in rows] == 3 * ["whole", "chunks", "recomputed", "student's only"]
    for whole, chunks, recomputed, student_only in (rows[start : start + 4] for start in range(0, 12, 4)):
        operations = [float(row[5]) for row in (whole, chunks, student_only, recomputed)]
        assert operations[0] == operations[1] == 1.0 < operations[2] < operations[3]  # no head runs twice in chunks


def test_tangent_kernel_prints_a_row_for_each_size():
    command = [sys.executable, "benchmarks/tangent_kernel.py", "--examples", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split(" | ")[0] for line in done.stdout.splitlines()]
    assert rows == ["parameters", "5,302", "20,130", "68,962"]
