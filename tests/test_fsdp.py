"""A student whose parameters FSDP2 shards over two processes learns what a whole one learns, in every stage."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("sharded.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run([*command, str(SCRIPT), str(folder)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def read(folder):
    return json.loads((folder / "history.json").read_text()), load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    "sharded, whole",
    [
        ("sharded", "whole"),
        ("accumulated", "whole"),
        ("checkpointed", "whole"),
        ("sharded teacher", "whole"),
        ("sharded, frozen", "whole, frozen"),
        ("GPT-2 sharded by accelerate", "whole GPT-2"),  # embeddings and tied head are one group, half of which runs
    ],
)
def test_loss_gradient_norm_and_weights_are_those_of_a_whole_student(runs, sharded, whole):
    (history, weights), (reference_history, reference_weights) = read(runs / sharded), read(runs / whole)
    for entry, reference in zip(history, reference_history, strict=True):
        assert entry["loss"] == pytest.approx(reference["loss"], rel=2e-4), reference["stage"]
        assert entry["norm"] == pytest.approx(reference["norm"], rel=2e-4), reference["stage"]
        assert entry["untouched"] == reference["untouched"]
    assert weights.keys() == reference_weights.keys()
    for name, weight in reference_weights.items():
        assert (weights[name] - weight).abs().max() < 2e-5, name


def test_blocks_and_heads_beyond_a_stage_get_no_gradient_and_do_not_move(runs):
    """Not even by weight decay, which moves whatever has a gradient, be it zero."""
    history, weights = read(runs / "sharded")
    beyond = {name for name in weights if ".layer.1." in name or name.startswith("cls.")}
    first_stage = history[:2]
    assert all(set(entry["untouched"]) == beyond for entry in first_stage)
    assert set(first_stage[-1]["unmoved"]) == beyond
    last = history[-1]
    assert last["untouched"] == last["unmoved"] == []


def test_operations_are_counted_on_shards_as_on_a_whole_student(runs):
    """A process counts its half of the batch; of the logits' rows it has its own, hence layer stages only."""
    history, reference = read(runs / "sharded")[0], read(runs / "whole")[0]
    assert [2 * entry["flops"] for entry in history[:4]] == [entry["flops"] for entry in reference[:4]]
    assert history[0]["flops"] < history[2]["flops"] < history[4]["flops"]


def test_the_runs_that_are_compared_differ(runs):
    """Freezing changes the result, so its comparison says something; so do stages, one from the other."""
    whole, frozen = read(runs / "whole")[1], read(runs / "whole, frozen")[1]
    assert any((whole[name] - frozen[name]).abs().max() > 1e-4 for name in whole)
    assert len({round(entry["loss"], 4) for entry in read(runs / "whole")[0][::2]}) == 4
    assert torch.isfinite(torch.cat([tensor.flatten() for tensor in whole.values()])).all()
