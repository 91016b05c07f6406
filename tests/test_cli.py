import json
import re
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import yaml
from report.test_tables import cells, finished_run, several_methods

from hf_curriculum_distill.cli import main
from hf_curriculum_distill.report.results import write_results
from hf_curriculum_distill.report.tables import format_summary

ROOT = Path(__file__).parents[1]


# ---- hf-curriculum-distill compare ----


def command(*argv, start=("-m", "hf_curriculum_distill.cli")):
    return subprocess.run([sys.executable, *start, *map(str, argv)], capture_output=True, text=True, timeout=300)


WRITTEN = {"comparison.html", "comparison.png", "comparison.svg"}


@pytest.fixture
def recipe_output(tmp_path):
    """The output folder of a recipe, with students of several methods."""
    results = several_methods(tmp_path / "out")
    write_results(tmp_path / "out", results)
    return tmp_path / "out"


def test_compare_prints_the_summary_and_writes_the_plot(recipe_output):
    done = command("compare", recipe_output)
    assert done.returncode == 0, done.stderr
    summary = format_summary(json.loads((recipe_output / "results.json").read_text()))
    written = f"plot: {recipe_output}/comparison.png, and as SVG\npage: {recipe_output}/comparison.html"
    assert done.stdout == f"{summary}\n\n{written}\n"
    assert cells(done.stdout)["curriculum"][-1] == "1.58"
    assert (recipe_output / "comparison.png").read_bytes()[1:4] == b"PNG"
    assert "<svg" in (recipe_output / "comparison.svg").read_text()


def test_compare_takes_several_folders_of_both_kinds(tmp_path, capsys):
    write_results(tmp_path / "a", [finished_run(tmp_path / "a", "one_shot", {2: 0.3, 4: 0.4})])
    finished_run(tmp_path, "curriculum", {2: 0.4, 4: 0.5})
    main(["compare", str(tmp_path / "a"), str(tmp_path / "curriculum 0")])
    lines = cells(capsys.readouterr().out)
    assert lines["one_shot"][-2:] == ["1.00", "1.00"] and lines["curriculum"][-2:] == ["2.00", "2.00"]
    assert (tmp_path / "a/comparison.png").is_file() and not (tmp_path / "curriculum 0/comparison.png").exists()


def test_every_option_of_compare_changes_what_it_says(tmp_path, capsys):
    for name, values in (("one_shot", {2: 0.5, 4: 0.25}), ("curriculum", {2: 0.25, 4: 0.25})):
        write_results(tmp_path / name, [finished_run(tmp_path, name, values, metric="eval_kl")])
    runs = [str(tmp_path / "one_shot"), str(tmp_path / "curriculum")]
    metric = ["--metric", "eval_kl"]

    main(["compare", *runs, *metric])
    lines = cells(capsys.readouterr().out)
    assert lines["method"][1] == "eval_kl" and lines["one_shot"][1] == "0.2500"
    assert lines["curriculum"][5:] == ["16", "3.00e+01", "2.00", "2.00"]

    main(["compare", *runs, *metric, "--threshold", "0.5"])
    out = capsys.readouterr().out
    assert "to reach 0.5:" in out and cells(out)["one_shot"][5:7] == ["16", "3.00e+01"]

    main(["compare", *runs, *metric, "--baseline", "curriculum"])
    out = capsys.readouterr().out
    assert "the highest final value of curriculum" in out and cells(out)["one_shot"][-2:] == ["0.50", "0.50"]

    main(["compare", *runs, *metric, "--output", str(tmp_path / "new/folder")])
    assert f"plot: {tmp_path}/new/folder/comparison.png" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "new/folder").iterdir()} == {
        "comparison.html",
        "comparison.png",
        "comparison.svg",
    }


def test_runs_that_are_not_finite_make_a_table_and_no_plot(tmp_path, capsys):
    write_results(tmp_path, [finished_run(tmp_path, name) for name in ("one_shot", "curriculum")])
    main(["compare", str(tmp_path)])
    out = capsys.readouterr().out
    assert "no run is finite" in out and "plot" not in out
    assert cells(out)["one_shot"] == ["0 of 1 finite", *"------"]
    assert not (tmp_path / "comparison.png").exists()


def test_without_matplotlib_there_is_the_table_and_what_to_install(recipe_output):
    code = "import sys; sys.modules['matplotlib'] = None; from hf_curriculum_distill.cli import main; main()"
    done = command("compare", recipe_output, start=("-c", code))
    assert done.returncode == 0, done.stderr
    *table, _, needs, page = done.stdout.splitlines()
    assert cells("\n".join(table))["one_shot"][0] == "3"
    assert needs == 'The plot needs matplotlib: pip install "hf_curriculum_distill[plots]"'
    assert page == f"page: {recipe_output}/comparison.html"  # without curves
    assert not (recipe_output / "comparison.png").exists()


def test_wrong_runs_end_with_status_2_and_one_line(recipe_output):
    done = command("compare", recipe_output, "--metric", "eval_f1")
    assert done.returncode == 2 and done.stdout == ""
    *usage, line = done.stderr.splitlines()
    assert any(text.startswith("usage: hf-curriculum-distill") for text in usage)  # after what libraries say on import
    assert line.startswith("hf-curriculum-distill: error: ")
    assert line.endswith("curriculum 0 has no 'eval_f1'; it was evaluated by eval_accuracy.")


def _damage(folder, file, text):
    (folder / file).write_text(text)
    return [folder]


def _make_folder(folder, file):
    (folder / file).unlink()
    (folder / file).mkdir()
    return [folder.parent]


WRONG = {
    "no folder": (lambda out: [out / "none"], r"none has neither .*; there is no such folder"),
    "neither kind": (
        lambda out: [out.parent],
        r"neither results.json \(a recipe's output\) nor trainer_state.json .*; there is out\.",
    ),
    "no JSON": (lambda out: _damage(out, "results.json", '[{"method"'), r"results.json is damaged: Expecting"),
    "no list": (lambda out: _damage(out, "results.json", "{}"), r"it holds a dict, not a list"),
    "no objects": (lambda out: _damage(out, "results.json", "[1]"), r"damaged: no method, path, finite in 1\."),
    "no steps": (
        lambda out: _damage(out, "results.json", '[{"method": "a", "path": "b", "finite": true, "samples": 1}]'),
        r"results.json is damaged: no steps in ",
    ),
    "no run": (
        lambda out: _damage(
            out, "results.json", '[{"method": "a", "path": "b/c", "finite": true, "samples": 1, "steps": 1}]'
        ),
        r"results.json names the run b/c, but there is no trainer_state.json in it",
    ),
    "damaged run": (lambda out: _damage(out / "too slow 0", "trainer_state.json", "{}"), r"damaged: no log_history"),
    "old record": (
        lambda out: _damage(out / "too slow 0", "curriculum.json", '{"method": "one_shot", "stages": []}'),
        r"curriculum.json is damaged: no samples_per_step",
    ),
    "speeds as metric": (
        lambda out: [out, "--metric", "eval_accuracy_runtime"],
        r"it was evaluated by eval_accuracy\.",
    ),
    "no baseline": (
        lambda out: [out, "--baseline", "two_shot"],
        r"'two_shot', but the runs' methods are broken, curriculum, last \+ hidden, one_shot, rarely, too slow\.",
    ),
    "no number": (lambda out: [out, "--threshold", "high"], r"invalid float value: 'high'"),
    "no room": (lambda out: [out, "--output", out / "results.json"], r"File exists"),
    "into a checkpoint": (
        lambda out: [out, "--output", out / "checkpoint-4"],
        r"--output is '.*checkpoint-4', a checkpoint, and only the run writes there; name another folder\.",
    ),
    "through a link": (
        lambda out: [(out / "comparison.svg").symlink_to(out / "results.json"), out][1:],
        r"comparison.svg is a symbolic link, and what it leads to is not overwritten",
    ),
    "wrong types": (
        lambda out: _damage(out / "too slow 0", "trainer_state.json", '{"log_history": [1], "global_step": 4}'),
        r"trainer_state.json is damaged: log_history is \[1\], not a list of objects\.",
    ),
    "control characters": (
        lambda out: _damage(out, "results.json", '[{"method": "\\u001b[2J", "path": "b", "finite": false}]'),
        r"results.json is damaged: method is '\\x1b\[2J', not a printable name\.",
    ),
    "lone surrogate": (
        lambda out: _damage(out, "results.json", r'[{"method": "a", "path": "\ud800", "finite": false}]'),
        r"results.json is damaged: path is '\\ud800', not the name of a folder\.",
    ),
    "deep": (lambda out: _damage(out, "results.json", 100_000 * "["), r"results.json is damaged: maximum recursion"),
    "a folder": (
        lambda out: _make_folder(out / "too slow 0", "curriculum.json"),
        r"Is a directory: .*curriculum.json",
    ),
    "threshold": (lambda out: [out, "--threshold", "inf"], r"threshold is inf; give a finite value of eval_accuracy"),
    "strange folder": (
        lambda out: [f"{out}/\x1b[2J\n\udcff"],
        r"/\\x1b\[2J\\? ?\\udcff has neither .* there is no such folder\.",
    ),
    "no run at all": (lambda out: [], r"required: RUN"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_runs_and_options_say_what_and_where(recipe_output, capsys, name):
    argv, message = WRONG[name]
    with pytest.raises(SystemExit) as error:
        main(["compare", *map(str, argv(recipe_output))])
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])


def test_a_run_is_plotted_beside_its_checkpoints_not_into_them(tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    finished_run(run, "one_shot", {2: 0.3, 4: 0.4})
    (run / "one_shot 0").rename(run / "checkpoint-4")
    for argument in (run / "checkpoint-4", "checkpoint-4", "."):
        monkeypatch.chdir(run / "checkpoint-4" if argument == "." else run)
        main(["compare", str(argument)])
        where = {".": "../"}.get(argument, "./")
        assert capsys.readouterr().out.endswith(
            f"plot: {where}comparison.png, and as SVG\npage: {where}comparison.html\n"
        )
        assert {path.name for path in run.iterdir()} == {
            "checkpoint-4",
            "comparison.html",
            "comparison.png",
            "comparison.svg",
        }
        (run / "comparison.png").unlink()
    assert {path.name for path in (run / "checkpoint-4").iterdir()} == {"trainer_state.json", "curriculum.json"}
    main(["compare", str(run)])
    assert (run / "comparison.png").is_file()


def test_the_same_method_and_seed_in_two_folders_is_no_repetition(tmp_path, capsys):
    for name in ("a", "b"):
        write_results(tmp_path / name, [finished_run(tmp_path / name, "one_shot", {4: 0.4})])
    main(["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    lines = cells(capsys.readouterr().out)
    assert [lines[f"one_shot ({name}/one_shot 0)"][0] for name in "ab"] == ["1", "1"] and "one_shot" not in lines


def test_a_command_is_needed_and_the_installed_one_is_this(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "required: COMMAND" in capsys.readouterr().err
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    name, value = config["options.entry_points"]["console_scripts"].strip().split(" = ")
    assert name == "hf-curriculum-distill" and EntryPoint(name, value, "console_scripts").load() is main


# ---- hf-curriculum-distill train ----


def test_a_recipe_runs_as_a_command(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    small = "--dimension 8 --sparsity 2 --teacher_width 16 --student_width 8 --teacher_max_samples 64 --max_steps 2"
    small += " --teacher_accuracy 0 --teacher_finish_samples 0 --teacher_save_samples 64 --calibration_samples 16"
    small += " --heldout_examples 16 --methods one_shot --seeds 0 --use_cpu true --per_device_train_batch_size 4"
    file = tmp_path / "small.yaml"
    file.write_text(f"recipe: sparse_parity\nteacher: {tmp_path / 'teacher'}\noutput_dir: {tmp_path / 'students'}\n")
    main(["train", "--config", str(file), *small.split()])
    assert cells(capfd.readouterr().out)["one_shot"][0] == "1"
    assert (tmp_path / "students/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("recipe", "option"),
    [
        ("bert_large", "mlm_probability"),
        ("causal_lm", "gguf_file"),
        ("embeddings", "heldout_sentences"),
        ("image_classification", "dataset"),
        ("pcfg", "grammar"),
        ("sparse_parity", "sparsity"),
        ("text_classification", "unlabelled_text"),
    ],
)
def test_the_help_of_a_recipe_begins_with_its_own_options(capsys, monkeypatch, recipe, option):
    monkeypatch.setattr(sys, "argv", sys.argv)
    with pytest.raises(SystemExit) as exit:
        main(["train", recipe, "--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0 and out.startswith(f"usage: {recipe}.py [--help] [--config FILE.yaml]")
    names = ["\ndistillation:", "\n  --layer_order ", "\ntraining, as for any Trainer:", "\n  --learning_rate "]
    for own in ("methods", option):
        places = [out.index(name) for name in ["\noptions:", f"\n  --{own} ", *names]]
        assert places == sorted(places)


def test_every_configuration_names_its_recipe():
    files = sorted((ROOT / "recipes/configs").glob("*/*.yaml"))
    assert files and all(yaml.safe_load(path.read_text())["recipe"] == path.parent.name for path in files)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train"], "The recipe is None; use one of bert_large, causal_lm, embeddings, image_classification, pcfg"),
        (["train", "bert"], "The recipe is 'bert'; use one of bert_large"),
        (["train", "--config", "none.yaml"], "No such file"),
        (
            ["train", "--config", str(ROOT / "recipes/accelerate/ddp.yaml")],
            "or write `recipe: RECIPE` into",
        ),
    ],
)
def test_a_recipe_must_be_named(capsys, argv, message):
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2 and message in capsys.readouterr().err
