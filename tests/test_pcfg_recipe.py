"""The grammar recipe as a subprocess, in seconds."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import BertForMaskedLM

from hf_curriculum_distill.parsing import parse_arguments
from hf_curriculum_distill.report.launch import plan_runs

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "recipes/configs/pcfg"
METHODS = ["labels", "one_shot", "curriculum", "every", "half", "online"]
VARIANTS = {
    "every": {"method": "progressive", "teacher_schedule": "fraction"},
    "half": {"method": "progressive", "teacher_schedule": [0.5]},
}
TINY = "--grammar cfg3b_original --start 14 --max_length 28 --num_layers 2 --teacher_heads 2 --student_heads 1 "
TINY += "--heldout_sentences 64 --earlier_teachers 2 "
TINY += "--teacher_steps 4 --teacher_save_steps 2 --teacher_batch_size 8 --max_steps 8 "
TINY += "--per_device_train_batch_size 8 --eval_steps 4 --logging_steps 4 --calibration_samples 8 --seeds 0 1 "
TINY += "--use_cpu true"


def recipe(folder, *options):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    paths = ["--teacher", str(folder / "teacher"), "--output_dir", str(folder / "students")]
    command = [sys.executable, "recipes/pcfg.py", *TINY.split(), *paths, *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def pcfg():
    """The recipe as a module."""
    spec = importlib.util.spec_from_file_location("pcfg", ROOT / "recipes/pcfg.py")
    module = sys.modules["pcfg"] = importlib.util.module_from_spec(spec)  # its arguments are pickled by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pcfg")
    done = recipe(folder, "--variants", json.dumps(VARIANTS), "--methods", *METHODS)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


def test_results_and_table_are_complete(finished):
    folder, done = finished
    results = json.loads((folder / "students/results.json").read_text())
    assert [(result["method"], result["seed"]) for result in results] == [(m, s) for m in METHODS for s in (0, 1)]
    for result in results:
        assert result["finite"] and result["steps"] == 8 and result["samples"] == 64
        assert 0 <= result["eval_accuracy"] <= 1 and 0 <= result["eval_agreement"] <= 1 and result["eval_kl"] >= 0
        assert result["student_flops"] > 0 and (result["teacher_flops"] > 0) == (result["method"] != "labels")
        assert BertForMaskedLM.from_pretrained(result["path"]).config.hidden_size == 8
    table = done.stdout[done.stdout.index("method ") :].splitlines()
    assert [line.split()[:2] for line in table[2 : 2 + len(METHODS)]] == [[method, "2"] for method in METHODS]


def test_the_teacher_keeps_its_checkpoints_and_progressive_students_learn_from_them(finished):
    folder, _ = finished
    checkpoints = sorted(entry.name for entry in (folder / "teacher").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-0", "checkpoint-2", "checkpoint-4"]
    assert not list(folder.glob("teacher/checkpoint-*/optimizer*"))
    for method, names in (("every", checkpoints), ("half", checkpoints[1:])):
        record = json.loads((folder / "students" / method / "seed-0/curriculum.json").read_text())
        assert [Path(path).name for path in record["teacher"]["name"].split(", ")] == names


def test_a_second_launch_uses_the_teacher_that_is_there(finished):
    folder, _ = finished
    before = (folder / "teacher/model.safetensors").stat().st_mtime_ns
    options = ["--output_dir", str(folder / "validation"), "--methods", "one_shot", "--evaluate_on", "validation"]
    done = recipe(folder, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "teacher/model.safetensors").stat().st_mtime_ns == before
    test, validation = (
        {r["seed"]: r["eval_loss"] for r in json.loads((folder / name / "results.json").read_text())
         if r["method"] == "one_shot"}
        for name in ("students", "validation")
    )  # fmt: skip
    assert test.keys() == validation.keys() and all(test[seed] != validation[seed] for seed in test)


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--teacher_heads", "4"], 1, "holds a teacher with hidden_size=16, but the options ask for 32"),
        (["--teacher_head", "4"], 2, "did you mean teacher_heads?"),
    ],
)
def test_wrong_options_are_said_before_training(finished, options, status, message):
    folder, _ = finished
    done = recipe(folder, "--output_dir", str(folder / "wrong"), *options)
    assert done.returncode == status
    assert message in done.stderr
    assert not (folder / "wrong").exists()


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--start", "15"], 1, "holds a teacher with start=14, but the options ask for 15"),
        (["--grammar", "cfg3b"], 1, "holds a teacher with grammar=cfg3b_original, but the options ask for cfg3b"),
        (["--num_layers", "3"], 1, "holds a teacher with num_hidden_layers=2, but the options ask for 3"),
        (["--teacher_steps", "6"], 1, "holds a teacher with steps=4, but the options ask for 6"),
        (["--methods", "two_shot"], 1, "methods names 'two_shot'"),
        (["--grammar", "english"], 2, "grammar is 'english'; use one of cfg3b"),
        (["--evaluate_on", "train"], 2, "evaluate_on is 'train'; use 'validation' or 'test'"),
        (["--teacher_save_steps", "3"], 2, "teacher_steps is 4, no multiple of teacher_save_steps, 3"),
        (["--start", "99"], 2, "no rules for the start symbol 99"),
    ],
)
def test_wrong_values_say_what_to_do(finished, pcfg, monkeypatch, capsys, options, status, message):
    folder, _ = finished
    paths = ["--teacher", str(folder / "teacher"), "--output_dir", str(folder / "wrong")]
    monkeypatch.setattr(sys, "argv", ["pcfg.py", *TINY.split(), *paths, *options])
    with pytest.raises(SystemExit) as exit:
        pcfg.main()
    assert exit.value.code == 2 if status == 2 else isinstance(exit.value.code, str)
    assert message in str(exit.value.code) + capsys.readouterr().err


def test_a_grammar_of_held_out_sentences_only_is_refused(pcfg):
    recipe = pcfg.RecipeArguments(start=13, max_length=16, heldout_sentences=4096)
    with pytest.raises(SystemExit, match="No sentence is left to train on; lower --heldout_sentences"):
        pcfg.data(recipe, "test", num_train=8)


def test_seeds_and_sets_share_no_masks_or_sentences_by_design(pcfg):
    recipe = pcfg.RecipeArguments(start=17, max_length=72, heldout_sentences=32)
    sets = [pcfg.data(recipe, name, 32, seed) for name, seed in (("test", 0), ("test", 1), ("validation", 0))]
    assert sets[0]["train_dataset"][:] == sets[2]["train_dataset"][:] != sets[1]["train_dataset"][:]
    assert sets[0]["eval_dataset"][:] == sets[1]["eval_dataset"][:] != sets[2]["eval_dataset"][:]


def test_no_held_out_sentence_is_trained_on_and_no_test_sentence_tuned_on(pcfg):
    recipe = pcfg.RecipeArguments(grammar="cfg3b_original", start=14, max_length=28, heldout_sentences=256)
    test, validation = (pcfg.data(recipe, name, 4096, seed=0) for name in ("test", "validation"))
    train = as_drawn(test["train_dataset"])
    assert train == as_drawn(validation["train_dataset"]) and 2500 < len(train) < 4096
    tested, tuned_on = as_drawn(test["eval_dataset"]), as_drawn(validation["eval_dataset"])
    assert len(tested) == 256 and 200 < len(tuned_on) <= 256
    assert not {*tested} & {*tuned_on} and not {*train} & {*tested, *tuned_on}


def as_drawn(sentences):
    """Sentences with their masked letters put back."""
    labels = sentences["labels"] if "labels" in sentences.column_names else sentences["input_ids"]
    pairs = (zip(ids, rights, strict=True) for ids, rights in zip(sentences["input_ids"], labels, strict=True))
    return [tuple(letter if right == -100 else right for letter, right in pair) for pair in pairs]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_are_read_and_their_methods_exist(pcfg, path):
    recipe, args = parse_arguments([pcfg.RecipeArguments, pcfg.TrainingConfig], ["--config", str(path)])
    runs = plan_runs(recipe, args)
    assert len(runs) == len(recipe.methods) * len(recipe.seeds)
    assert yaml.safe_load(path.read_text())["output_dir"].startswith("runs/pcfg/")
