"""One batch of 16 is one batch of 16, however it is cut: into micro-batches, or over processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("two_processes.py")


def train(folder, processes, batch, accumulation):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *launch, str(SCRIPT), str(folder), str(batch), str(accumulation)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "history.json").read_text()), load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"), processes=1, batch=16, accumulation=1)


@pytest.mark.parametrize(("processes", "batch", "accumulation"), [(1, 4, 4), (2, 8, 1), (2, 2, 4)])
def test_loss_gradient_norm_and_weights_do_not_depend_on_how_the_batch_is_cut(
    whole, tmp_path, processes, batch, accumulation
):
    history, weights = train(tmp_path, processes, batch, accumulation)
    exact, expected = {"step", "stage", "eval_accuracy", "eval_agreement", "learning_rate"}, whole[0]
    measured = {"loss", "grad_norm", "hidden_mse", "kl", "label_loss", "eval_loss", "eval_kl"} | exact
    assert [entry["step"] for entry in history] == [entry["step"] for entry in expected]
    for entry, reference in zip(history, expected, strict=True):
        for name in measured & set(reference) - {"eval_loss"}:  # Trainer's eval_loss is a mean over batches' means
            assert entry[name] == pytest.approx(reference[name], rel=2e-4, abs=1e-6), (name, reference["step"])
    for name, weight in whole[1].items():
        assert (weights[name] - weight).abs().max() < 2e-5, name
