"""One batch of 16 is one batch of 16, however it is cut: into micro-batches, or over processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("two_processes.py")


def train(folder, processes, batch, accumulation):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *launch, str(SCRIPT), str(folder), str(batch), str(accumulation)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def read(folder):
    return json.loads((folder / "history.json").read_text()), load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"), processes=1, batch=16, accumulation=1)


@pytest.fixture(scope="module", params=[(1, 4, 4), (2, 8, 1), (2, 2, 4)], ids=str)
def cut(request, tmp_path_factory):
    """The folder of the same training with another number of processes, batch size and accumulation."""
    return train(tmp_path_factory.mktemp("cut"), *request.param)


def assert_same_training(actual, expected):
    (history, weights), (reference_history, reference_weights) = read(actual), read(expected)
    exact = {"step", "stage", "eval_accuracy", "eval_agreement", "learning_rate"}
    measured = {"loss", "grad_norm", "hidden_mse", "kl", "label_loss", "teacher_loss", "eval_kl"} | exact
    # not eval_loss: Trainer's is a mean over batches' means
    assert [entry["step"] for entry in history] == [entry["step"] for entry in reference_history]
    for entry, reference in zip(history, reference_history, strict=True):
        for name in measured & set(reference):
            assert entry[name] == pytest.approx(reference[name], rel=2e-4, abs=1e-6), (name, reference["step"])
    assert_close(weights, reference_weights)


def assert_close(weights, expected):
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        assert (weights[name] - weight).abs().max() < 2e-5, name


def test_loss_gradient_norm_and_weights_do_not_depend_on_how_the_batch_is_cut(whole, cut):
    assert_same_training(cut, whole)


@pytest.mark.parametrize("run", ["block", "slowed", "independent", "measured", "progressive", "pca"])
def test_nor_does_what_freezes_blocks_exchanges_teachers_or_measures_before_the_first_step(whole, cut, run):
    assert_same_training(cut / run, whole / run)


def test_recomputing_activations_changes_nothing_on_any_number_of_processes(whole, cut):
    assert_same_training(cut / "checkpointed", whole)


def test_logits_in_chunks_change_nothing_on_any_number_of_processes(whole, cut):
    assert_same_training(whole / "chunks", whole)
    assert_same_training(cut / "chunks", whole)


def test_epochs_that_end_in_a_smaller_step_and_processes_without_labels_are_cut_as_exactly(whole, cut):
    assert [entry["step"] for entry in read(whole / "uneven")[0] if "loss" in entry] == list(range(1, 9))
    assert_same_training(cut / "uneven", whole / "uneven")


def test_with_even_batches_the_first_examples_fill_up_the_last_batch(whole, cut):
    """That is accelerate's default; on one process the reference has these examples in its data."""
    assert_same_training(cut / "padded", whole / "padded")


def test_an_online_teacher_does_not_either_and_is_the_same_on_every_process(whole, cut):
    assert_same_training(cut / "online", whole / "online")
    assert all("teacher_loss" in entry for entry in read(cut / "online")[0] if "loss" in entry)
    (expected,) = (load_file(file) for file in (whole / "online").glob("teacher_*.safetensors"))
    teachers = [load_file(file) for file in (cut / "online").glob("teacher_*.safetensors")]
    for teacher in teachers:
        assert_close(teacher, expected)
        assert all(torch.equal(tensor, teachers[0][name]) for name, tensor in teacher.items())


@pytest.mark.parametrize("name", ["saved", "online", "balanced"])
def test_a_run_resumed_between_two_logs_is_one_that_was_never_interrupted_on_every_process(cut, name):
    (history, weights), (expected_history, expected) = read(cut / f"{name} resumed"), read(cut / name)
    timed = ("runtime", "per_second")
    histories = [
        [{n: v for n, v in e.items() if not n.endswith(timed)} for e in h] for h in (history, expected_history)
    ]
    assert histories[0] == histories[1]
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    teachers = list((cut / name).glob("teacher_*.safetensors"))
    assert len(teachers) == (0 if name != "online" else len(list((cut / "online").glob("checkpoint-3/rng_state*"))))
    for file in teachers:
        teacher, expected = load_file(cut / f"{name} resumed" / file.name), load_file(file)
        assert all(torch.equal(teacher[name], tensor) for name, tensor in expected.items())
