"""Under DeepSpeed ZeRO, two processes learn what one process learns without it, in every stage.

Needs deepspeed, which runs on a CPU and comes with the `test` extra on Linux.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import BertForMaskedLM

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
SCRIPT = Path(__file__).with_name("zero.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}


def launch(folder, processes, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(SCRIPT), str(folder), *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("reference"), 1)


@pytest.fixture(scope="module", params=["2", "3"], ids=["ZeRO-2", "ZeRO-3"])
def runs(request, tmp_path_factory):
    return launch(tmp_path_factory.mktemp("zero"), 2, request.param)


def read(folder):
    """The run's logs, and its weights as any user loads them: ZeRO-2's file repeats those that are tied."""
    student = BertForMaskedLM.from_pretrained(folder)
    return json.loads((folder / "run.json").read_text()), dict(student.named_parameters())


def assert_same_training(actual, expected):
    (run, weights), (reference, reference_weights) = read(actual), read(expected)
    measured = {"step", "stage", "loss", "grad_norm", "learning_rate", "hidden_mse", "kl", "label_loss"}
    measured |= {"teacher_loss", "eval_accuracy", "eval_agreement", "eval_kl"}
    assert len(run["history"]) == len(reference["history"])
    for ours, theirs in zip(run["history"], reference["history"], strict=True):
        for name in measured & set(theirs):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=1e-6), (name, theirs["step"])
    assert weights.keys() == reference_weights.keys()
    for name, weight in reference_weights.items():
        assert (weights[name] - weight).abs().max() < 2e-5, name


@pytest.mark.parametrize("run", ["plain", "accumulated", "whole forward", "resumed"])
def test_loss_gradient_norm_and_weights_are_those_of_one_process_without_it(runs, reference, run):
    """Stopping after a block included: ZeRO-3 gathers what is needed where the forward pass ends early, too."""
    assert_same_training(runs / run, reference / "plain")


def test_an_online_teacher_learns_and_teaches_the_same(runs, reference):
    assert_same_training(runs / "online", reference / "online")


def test_a_frozen_teacher_is_left_alone_and_blocks_beyond_a_stage_do_not_move(runs):
    run, weights = read(runs / "plain")
    assert run["teacher_unchanged"]
    beyond = {name for name in weights if ".layer.1." in name or name.startswith("cls.")}
    assert not beyond & {*run["moved"][0], *run["moved"][1]}
    assert beyond <= {*run["moved"][-1], *run["moved"][-2], *run["moved"][-4]}


def test_weight_decay_would_move_blocks_beyond_a_stage_and_is_refused(runs):
    assert (runs / "refusal.txt").read_text().startswith("weight_decay is 0.1, but DeepSpeed takes missing gradients")
