"""The image recipe, its real entry point, on scikit-learn's digits."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForImageClassification

from hf_curriculum_distill.config import METHODS
from hf_curriculum_distill.parsing import parse_arguments
from hf_curriculum_distill.report.launch import plan_runs

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "recipes/image_classification.py"
CONFIGS = ROOT / "recipes/configs/image_classification"
TINY = "--dataset digits --image_size 8 --patch_size 4 --train_images 32 --heldout_images 24 --teacher_from vit-2-16 "
TINY += "--teacher_steps 4 --teacher_save_steps 2 --teacher_batch_size 8 --student vit-1-8 --max_steps 2 --seeds 0 "
TINY += "--per_device_train_batch_size 8 --calibration_samples 8 --use_cpu true --bf16 false"
VARIANTS = {"early-stopped": {"method": "one_shot", "teacher_share": 0.5}}
VARIANTS |= {"half": {"method": "one_shot", "student": "teacher-1"}}
RUNS = ["labels", "one_shot", "curriculum", "online", "progressive", *VARIANTS]


def options(folder, *more):
    return [*TINY.split(), "--teacher", str(folder / "teacher"), "--output_dir", str(folder / "run"), *more]


def launch(*given):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPT), *given]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("image_classification", SCRIPT)
    module = sys.modules["image_classification"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    more = ["--methods", *RUNS, "--variants", json.dumps(VARIANTS), "--complexity_images", "6"]
    done = launch(*options(folder, *more))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


def record(folder, method):
    return json.loads((folder / f"run/{method}/seed-0/curriculum.json").read_text())


def test_a_comparison_ends_with_results_of_every_method_and_a_table(finished):
    folder, done = finished
    results = json.loads((folder / "run/results.json").read_text())
    assert [result["method"] for result in results] == RUNS and set(METHODS) - {"hidden"} <= set(RUNS)
    for result in results:
        assert result["finite"] and (result["steps"], result["samples"]) == (2, 16)
        config = AutoModelForImageClassification.from_pretrained(result["path"]).config
        assert (config.hidden_size, config.num_hidden_layers) == ((16, 1) if result["method"] == "half" else (8, 1))
        assert config.id2label == {n: str(n) for n in range(10)}
    assert "on 24 held-out images" in done.stderr
    assert all(name in done.stdout for name in RUNS)


def test_each_method_has_the_teacher_that_it_says(finished):
    folder, _ = finished
    names = {name: record(folder, name)["teacher"]["name"] for name in RUNS if name != "online"}
    assert names["one_shot"] == names["curriculum"] == "checkpoint-4" and names["early-stopped"] == "checkpoint-2"
    assert names["progressive"] == "checkpoint-2, checkpoint-4"
    assert [stage["name"] for stage in record(folder, "curriculum")["stages"]] == ["layer 1", "kl + layer 1"]


def test_complexity_is_measured_of_every_run(finished):
    folder, _ = finished
    for name in RUNS:
        points = json.loads((folder / f"run/{name}/seed-0/complexity.json").read_text())
        assert points[0]["step"] == 0 and points[-1]["step"] == 2
        assert ("layer 1" in points[0]["complexity"]) == (name == "curriculum")
        assert ("online teacher" in points[0]["complexity"]) == (name in ("online", "progressive"))


def test_resnets_learn_and_teach_logits_and_say_why_no_layers(recipe, monkeypatch, tmp_path):
    more = ["--teacher_from", "resnet-1-8", "--student", "resnet-1-4", "--image_size", "16"]
    done = launch(*options(tmp_path, *more, "--methods", "one_shot", "online"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(result["finite"] for result in json.loads((tmp_path / "run/results.json").read_text()))
    more += ["--methods", "curriculum", "--overwrite_output_dir", "true"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options(tmp_path, *more)])
    with pytest.raises(SystemExit, match="ResNetForImageClassification change their shape between its stages"):
        recipe.main()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--student", "cnn-3"], "student is 'cnn-3'; use vit-LAYERS-HIDDEN or resnet-BLOCKS-CHANNELS"),
        (["--teacher_from", "teacher-2"], "teacher_from is 'teacher-2'; use vit-LAYERS-HIDDEN"),
        (["--teacher_share", "0"], "teacher_share is 0.0; it is a share of a training"),
    ],
)
def test_wrong_options_end_the_recipe_with_status_2(recipe, monkeypatch, tmp_path, capsys, given, message):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options(tmp_path, *given)])
    with pytest.raises(SystemExit) as ended:
        recipe.main()
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_the_teacher_of_another_size_is_refused(finished, recipe, monkeypatch, tmp_path):
    more = ["--teacher_from", "vit-3-16", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options(finished[0], *more)])
    with pytest.raises(SystemExit, match="num_hidden_layers=2, but the options ask for 3"):
        recipe.main()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_are_read_and_their_methods_exist(recipe, path):
    kinds = [recipe.RecipeArguments, recipe.TrainingConfig]
    arguments, args = parse_arguments(kinds, ["--config", str(path), "--use_cpu", "true", "--bf16", "false"])
    assert len(plan_runs(arguments, args)) == len(arguments.methods) * len(arguments.seeds)
    assert set(arguments.variants or {}) <= set(arguments.methods)
