"""The real entry points, as subprocesses, in seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
QUICKSTART = "recipes/configs/bert_large/quickstart.yaml"
TINY = "--block_size 16 --eval_blocks 8 --teacher_size bert-2-32 --teacher_steps 2 --student bert-2-16 --max_steps 8 "
TINY += "--per_device_train_batch_size 4 --per_device_eval_batch_size 4 --eval_steps 4 --save_steps 4 --logging_steps 2"


def run(*command):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


def recipe(folder, *options):
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "1", "recipes/bert_large.py"]
    paths = ["--config", QUICKSTART, "--teacher", str(folder / "teacher"), "--output_dir", str(folder / "student")]
    return run(*launch, *paths, *TINY.split(), *options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    done = recipe(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


def test_the_recipe_ends_with_table_results_plot_and_students(finished):
    folder, done = finished
    results = json.loads((folder / "student/results.json").read_text())
    assert [result["method"] for result in results] == ["curriculum", "one_shot"]
    for result in results:
        assert result["finite"] and result["steps"] == 8 and result["samples"] == 32
        assert result["student_flops"] > 0 and result["teacher_flops"] > 0 and result["seconds"] > 0
        assert 0 <= result["eval_accuracy"] <= 1 and 0 <= result["eval_agreement"] <= 1 and result["eval_kl"] >= 0
        assert Path(result["path"], "model.safetensors").is_file()
    assert results[0]["teacher_flops"] < results[1]["teacher_flops"]  # layer stages run a prefix, without heads
    table = done.stdout[done.stdout.index("method ") :].splitlines()
    assert [line.split()[0] for line in table[2:5]] == ["(teacher)", "curriculum", "one_shot"]
    assert (folder / "student/comparison.png").read_bytes()[1:4] == b"PNG"
    stages = json.loads((folder / "student/curriculum.json").read_text())["stages"]
    assert [(stage["name"], stage["until"]) for stage in stages] == [("layer 1", 2), ("layer 2", 4), ("kl", None)]
    assert any(folder.joinpath("student").glob("runs/*/events*")) or any(folder.glob("student/**/events*"))


def test_the_student_is_plain_and_fills_masks_in_a_fresh_process(finished):
    folder, _ = finished
    names = load_file(folder / "student/model.safetensors").keys()
    assert not [name for name in names if "teacher" in name or "projection" in name]
    done = run("recipes/fill_mask.py", str(folder / "student"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert len([line for line in done.stdout.splitlines() if "[MASK]" in line and "->" in line]) == 3


def test_a_second_run_uses_the_teacher_that_is_there_and_resumes(finished):
    folder, _ = finished
    before = (folder / "teacher/model.safetensors").stat().st_mtime_ns
    student = load_file(folder / "student/model.safetensors")
    done = recipe(folder, "--resume_from_checkpoint", "last")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "teacher/model.safetensors").stat().st_mtime_ns == before
    again = load_file(folder / "student/model.safetensors")
    assert all((again[name] == student[name]).all() for name in student)


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--method", "two_shot"], 2, "method is 'two_shot'; use one of 'curriculum', 'one_shot'"),
        (["--student", "bert-huge"], 1, "'bert-huge' is no model"),
        (["--teacher_size", "bert-3-32"], 1, "holds a teacher with num_hidden_layers=2"),
        (["--block_size", "100000"], 1, "fills no block of 100000 tokens"),
    ],
)
def test_wrong_options_are_said_before_training(finished, options, status, message):
    folder, _ = finished
    done = run("recipes/bert_large.py", "--config", QUICKSTART, *TINY.split(),
               "--teacher", str(folder / "teacher"), "--output_dir", str(folder / "wrong"), *options)  # fmt: skip
    assert done.returncode == status
    assert message in done.stderr
    assert not (folder / "wrong/model.safetensors").exists()
