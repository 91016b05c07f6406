"""Benchmarks run, and say what they measured; how fast is never asserted."""

import os
import subprocess
import sys
from pathlib import Path

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
