"""The parity recipe, its real entry point, at a size that learns in a second."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_same_weights, weights
from transformers import AutoModelForCausalLM

from hf_curriculum_distill.config import METHODS
from hf_curriculum_distill.parsing import parse_arguments
from hf_curriculum_distill.report.launch import plan_runs
from hf_curriculum_distill.tasks.parity import ParityMLPForSequenceClassification, draw_support

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "recipes/sparse_parity.py"
CONFIGS = ROOT / "recipes/configs/sparse_parity"
TINY = "--dimension 8 --sparsity 2 --teacher_width 32 --student_width 8 --num_layers 1 --heldout_examples 256 "
TINY += "--teacher_save_samples 320 --teacher_max_samples 6400 --teacher_accuracy 0.95 --teacher_learning_rate 0.5 "
TINY += "--teacher_finish_samples 640 "
TINY += "--max_steps 8 --per_device_train_batch_size 8 --calibration_samples 32 --use_cpu true"
# in a comparison of two steps with one checkpoint each, a list of ends fits whatever steps the checkpoints are of
HALVES = json.dumps({"progressive": {"teacher_schedule": [0.5]}})


def options(folder, *more):
    return [*TINY.split(), "--teacher", str(folder / "teacher"), "--output_dir", str(folder / "run"), *more]


@pytest.fixture(scope="module")
def sparse_parity():
    """The recipe as a module."""
    spec = importlib.util.spec_from_file_location("sparse_parity", SCRIPT)
    module = sys.modules["sparse_parity"] = importlib.util.module_from_spec(spec)  # its arguments are pickled by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def main(sparse_parity, monkeypatch):
    """The recipe's `main` with these options."""

    def main(*given):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *given])
        sparse_parity.main()

    return main


def results(folder):
    return json.loads((folder / "run/results.json").read_text())


def record(path):
    return json.loads(Path(path, "curriculum.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", str(SCRIPT)]
    given = options(folder, "--methods", *METHODS, "--variants", HALVES, "--seeds", "0", "3")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *launch, *given], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


def test_a_comparison_ends_with_results_of_every_method_and_seed_and_a_table(finished):
    folder, done = finished
    found = results(folder)
    assert [(r["method"], r["seed"]) for r in found] == [(method, seed) for method in METHODS for seed in (0, 3)]
    for result in found:
        assert result["finite"] and (result["steps"], result["samples"]) == (8, 64)
        assert 0 <= result["eval_accuracy"] <= 1 and 0 <= result["eval_agreement"] <= 1 and result["eval_kl"] >= 0
        assert result["student_flops"] > 0 and result["seconds"] > 0
        assert (result["teacher_flops"] == 0) == (result["method"] == "labels")
        assert Path(result["path"]) == folder / "run" / result["method"] / f"seed-{result['seed']}"
        student = ParityMLPForSequenceClassification.from_pretrained(result["path"])
        assert (student.config.input_size, student.config.hidden_size) == (8, 8)
        assert student.config.support == draw_support(8, 2, 0)
        assert record(result["path"])["method"] == result["method"]
    table = done.stdout[done.stdout.index("method ") :]
    assert all(method in table for method in METHODS)
    # other seeds are other students on other examples
    assert len({result["eval_loss"] for result in found}) == len(found)


def test_the_teacher_is_trained_until_it_is_good_enough_and_kept_with_its_history(finished):
    folder = finished[0] / "teacher"
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    accuracy = {log["step"]: log["eval_accuracy"] for log in history if "eval_accuracy" in log}
    assert list(accuracy) == [*range(5, max(accuracy) + 1, 5)]  # 320 examples are 5 steps of 64
    good_enough = min(step for step, value in accuracy.items() if value >= 0.95)
    assert max(accuracy) == good_enough + 10  # 640 examples more
    assert accuracy[max(accuracy)] >= 0.95
    assert {path.name for path in folder.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (0, *accuracy)}
    assert not list(folder.glob("checkpoint-*/optimizer.pt"))
    last = ParityMLPForSequenceClassification.from_pretrained(folder / f"checkpoint-{max(accuracy)}")
    assert_same_weights(weights(last), weights(ParityMLPForSequenceClassification.from_pretrained(folder)))


def test_the_progressive_teacher_is_a_checkpoint_inside_the_transition_and_the_last(finished):
    folder = finished[0] / "teacher"
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    accuracy = {log["step"]: log["eval_accuracy"] for log in history if "eval_accuracy" in log}
    inside = min(accuracy, key=lambda step: abs(accuracy[step] - 0.75))
    run = record(finished[0] / "run/progressive/seed-0")
    assert run["teacher"]["name"].split(", ") == [
        f"checkpoint-{inside}",
        f"checkpoint-{max(accuracy)}",
    ]
    assert run["settings"]["teacher_schedule"] == [0.5]
    for method in ("curriculum", "one_shot"):
        name = record(finished[0] / "run" / method / "seed-0")["teacher"]["name"]
        assert name == f"checkpoint-{max(accuracy)}"


def test_a_second_launch_uses_the_teacher_that_is_there_and_takes_variants_as_json(finished, main, tmp_path):
    teacher = finished[0] / "teacher"
    before = {path: path.stat().st_mtime_ns for path in teacher.rglob("*")}
    variants = {
        "last layer": {"layer_order": "last", "learning_rate": 0.25},
        "labels": {"max_steps": 5},
        "diverging": {"method": "one_shot", "learning_rate": 1e30, "logging_steps": 1},
    }
    given = ["--methods", *variants, "one_shot", "--variants", json.dumps(variants), "--seeds", "0"]
    main(*options(tmp_path, "--teacher", str(teacher), *given))
    assert {path: path.stat().st_mtime_ns for path in teacher.rglob("*")} == before
    last_layer, labels, diverging, one_shot = results(tmp_path)
    assert record(last_layer["path"])["method"] == "curriculum"
    assert [stage["name"] for stage in record(last_layer["path"])["stages"]] == ["layer 1", "kl"]
    assert Path(last_layer["path"]) == tmp_path / "run/last_layer/seed-0"
    assert labels["steps"] == 5
    assert diverging["finite"] is False and "eval_accuracy" not in diverging and "is " in diverging["error"]
    # the same seed is the same run, in another launch too
    first = next(r for r in results(finished[0]) if (r["method"], r["seed"]) == ("one_shot", 0))
    assert first.keys() == one_shot.keys()
    assert all(first[name] == one_shot[name] for name in first.keys() - {"seconds", "path"})


@pytest.mark.parametrize(
    "given, message",
    [
        (
            ["--support", "0", "7"],
            r"holds a teacher with support=\[.*\], but the options ask for \[0, 7\]; name",
        ),
        (["--teacher_width", "64"], r"holds a teacher with hidden_size=32, but the options ask for 64; name another"),
        (["--methods", "two_shot"], r"methods names 'two_shot'; use curriculum"),
        (
            ["--methods", "a", "--variants", '{"a": {"learning_rat": 1}}'],
            r"variants\.a sets 'learning_rat'.* did you mean learning_rate\?",
        ),
        (["--methods", "a", "--variants", '{"a": {"temperature": 0}}'], r"temperature is 0"),
        (["--variants", "{1"], r"variants is '\{1', which is no valid JSON"),
    ],
)
def test_what_cannot_be_compared_ends_the_recipe_before_any_training(finished, main, tmp_path, given, message):
    with pytest.raises(SystemExit, match=message):
        main(*options(tmp_path, "--teacher", str(finished[0] / "teacher"), *given))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "given, message",
    [
        (["--model", "cnn"], "model is 'cnn'; use 'mlp' or 'transformer'"),
        (["--support", "1", "2", "3"], "support names 3 bits, but sparsity is 2"),
        (["--sparsety", "3"], "'sparsety', which is no option; did you mean sparsity?"),
    ],
)
def test_wrong_options_end_the_recipe_with_status_2(main, tmp_path, capsys, given, message):
    with pytest.raises(SystemExit) as ended:
        main(*options(tmp_path, *given))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_teacher_that_does_not_learn_ends_the_recipe_and_is_not_used(main, tmp_path):
    slow = ["--teacher_learning_rate", "1e-6", "--teacher_max_samples", "6400"]
    message = (
        r"The teacher's held-out accuracy is 0\.\d{4} after 6,400 examples, below 0\.95; raise --teacher_max_samples"
    )
    for _ in range(2):  # what the first launch left is no teacher
        with pytest.raises(SystemExit, match=message) as ended:
            main(*options(tmp_path, *slow))
        assert isinstance(ended.value.code, str)  # printed, with exit status 1
    assert not (tmp_path / "run/results.json").exists()
    main(*options(tmp_path, "--methods", "one_shot", "--seeds", "0"))
    history = json.loads((tmp_path / "teacher/trainer_state.json").read_text())["log_history"]
    last = max(log["step"] for log in history if "eval_accuracy" in log)
    teacher = record(tmp_path / "run")["teacher"]["name"]
    assert teacher == f"checkpoint-{last}"


def test_transformers_learn_it_as_a_language_model_of_the_last_token(main, tmp_path):
    given = (
        "--model transformer --teacher_width 16 --student_width 8 --num_layers 2 --head_dim 4 --teacher_accuracy 0.3"
    )
    main(*options(tmp_path, *given.split(), "--methods", *METHODS, "--variants", HALVES, "--seeds", "1"))
    found = results(tmp_path)
    assert [(r["method"], r["finite"], r["steps"]) for r in found] == [(method, True, 8) for method in METHODS]
    stages = record(found[0]["path"])["stages"]
    assert [stage["name"] for stage in stages] == ["layer 1", "layer 2", "kl"]
    for result in found:
        student = AutoModelForCausalLM.from_pretrained(result["path"])
        sizes = student.config.n_embd, student.config.n_layer, student.config.n_head, student.config.n_positions
        assert (*sizes, student.config.vocab_size) == (8, 2, 2, 9, 2)
        assert 0 <= result["eval_accuracy"] <= 1


def test_before_the_last_checkpoint_an_untrained_teacher_can_teach(finished, main, sparse_parity, tmp_path):
    teacher = finished[0] / "teacher"
    given = ["--first_checkpoint", "untrained", "--methods", "progressive", "--variants", HALVES, "--seeds", "0"]
    main(*options(tmp_path, "--teacher", str(teacher), *given))
    names = record(results(tmp_path)[0]["path"])["teacher"]["name"].split(", ")
    assert names[0] == "checkpoint-0" and len(names) == 2
    sparse_parity.set_seed(0)
    recipe = sparse_parity.RecipeArguments(dimension=8, sparsity=2)
    untrained = ParityMLPForSequenceClassification.from_pretrained(teacher / names[0])
    assert_same_weights(weights(untrained), weights(sparse_parity.make_model(recipe, 32)))


def test_shuffled_features_are_those_of_the_example_before_and_the_logits_are_right(finished, sparse_parity):
    folder = finished[0] / "teacher"
    plain, shuffled = (
        kind.from_pretrained(folder) for kind in (ParityMLPForSequenceClassification, sparse_parity.ShuffledFeatures)
    )
    inputs, hidden = sparse_parity.SparseParity(6, 8, [0, 1], seed=0).__getitems__(range(6))["inputs"], []
    for model in (plain, shuffled):
        model.blocks[0].register_forward_hook(lambda _, args, out: hidden.append(out))
    torch.testing.assert_close(shuffled(inputs).logits, plain(inputs).logits)
    for index in range(6):
        torch.testing.assert_close(hidden[0][index], hidden[1][index - 1])


def test_a_search_of_samples_goes_on_where_it_was_stopped(main, tmp_path, capsys):
    given = ["--dimensions", "6", "8", "--methods", "curriculum", "labels", "--seeds", "0", "1", "--max_steps", "80"]
    given += ["--variants", '{"labels": {"lr_scheduler_type": "constant"}}', "--smallest_budget", "160"]
    main(*options(tmp_path, *given))
    path = tmp_path / "run/scaling.json"
    records = json.loads(path.read_text())
    ended = [record for record in records if record["reached"] or record["last"]]
    searches = {(record["method"], record["dimension"], record["seed"]) for record in ended}
    assert searches == {(m, d, s) for m in ("curriculum", "labels") for d in (6, 8) for s in (0, 1)} | {
        ("teacher", d, 0) for d in (6, 8)
    }
    for record in records:
        if record["method"] != "teacher":
            assert record["reached"] == (record["accuracy"] >= 0.99) and record["samples"] <= record["budget"] * 8
    # the one constant training of the labels is long, and ends where a budget of the search is enough
    assert {record["budget"] for record in records if record["method"] == "labels"} == {80}
    grown = [r["budget"] for r in records if (r["method"], r["dimension"], r["seed"]) == ("curriculum", 8, 1)]
    assert grown == [20, 28, 40, 57, 80][: len(grown)]
    table = capsys.readouterr().out
    assert "(6, 2)" in table and "samples ~ d^c" in table and (tmp_path / "run/scaling.png").is_file()
    # without its last search, a second launch makes that one alone, and to the same end
    path.write_text(json.dumps([record for record in records if (record["method"], record["seed"]) != ("labels", 1)]))
    main(*options(tmp_path, *given))
    again = json.loads(path.read_text())
    assert sorted(map(str, again)) == sorted(map(str, records)) and again[-1]["method"] == "labels"
    assert capsys.readouterr().out[-100:] == table[-100:]


def test_a_task_whose_teacher_does_not_learn_has_no_students(main, tmp_path, capsys):
    given = ["--sparsities", "3", "--teacher_learning_rate", "1e-6", "--teacher_max_samples", "640"]
    main(*options(tmp_path, *given, "--methods", "labels", "--seeds", "0"))
    [record] = json.loads((tmp_path / "run/scaling.json").read_text())
    assert (record["method"], record["reached"], record["samples"]) == ("teacher", False, 640)
    assert "not within budget" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_describes_only_what_it_compares(sparse_parity, path):
    kinds = [sparse_parity.RecipeArguments, sparse_parity.TrainingConfig]
    recipe, args = parse_arguments(kinds, ["--config", str(path), "--use_cpu", "true", "--bf16", "false"])
    runs = plan_runs(recipe, args)
    assert list(dict.fromkeys(run.method for run in runs)) == recipe.methods
    assert set(recipe.variants or {}) <= set(recipe.methods)
    folders = [run.args.output_dir for run in runs]
    assert len(set(folders)) == len(folders)
    assert parse_arguments(kinds, ["--config", str(path), "--methods", "labels"])[0].methods == ["labels"]


def test_the_demo_is_the_papers_small_task(sparse_parity):
    kinds = [sparse_parity.RecipeArguments, sparse_parity.TrainingConfig]
    recipe, args = parse_arguments(kinds, ["--config", str(CONFIGS / "demo.yaml")])
    assert (recipe.dimension, recipe.sparsity, recipe.model, recipe.seeds) == (50, 6, "mlp", [0, 1, 2])
    assert (recipe.teacher_width, recipe.student_width, recipe.num_layers) == (1000, 100, 1)
    assert recipe.support == draw_support(50, 6, 0)
    assert (args.optim, args.max_steps, args.train_batch_size, args.lr_scheduler_type) == ("sgd", 3125, 64, "cosine")


def test_held_out_examples_are_the_same_for_every_seed_and_no_students(sparse_parity):
    recipe = sparse_parity.RecipeArguments(heldout_examples=100)
    rows, heldout = [], []
    for seed in (0, 1, sparse_parity.TEACHER_SEED):
        data = sparse_parity.data(recipe, 100, seed)
        rows += [tuple(row) for row in data["train_dataset"].__getitems__(range(100))["inputs"].tolist()]
        heldout.append({tuple(row) for row in data["eval_dataset"].__getitems__(range(100))["inputs"].tolist()})
    assert len(set(rows)) == 300
    assert heldout[0] == heldout[1] == heldout[2]
    assert not heldout[0] & set(rows)
