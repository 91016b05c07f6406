"""Runs are read once each, from wherever they lie, and only those that repeat each other share a row."""

import functools
import json
import math
import shutil
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_curriculum_distill import CurriculumDistillationTrainer
from hf_curriculum_distill.report.results import (
    earlier_results,
    printable,
    read_results,
    update_results,
    write_results,
)
from hf_curriculum_distill.report.tables import format_summary
from report.test_tables import cells, finished_run


def test_results_are_written_as_a_list_and_read_back(tmp_path):
    results = [finished_run(tmp_path, "curriculum", {4: 0.4}), finished_run(tmp_path, "one_shot")]
    write_results(tmp_path / "new", results)
    assert json.loads((tmp_path / "new/results.json").read_text()) == results
    assert read_results([tmp_path / "new"]) == results


def test_a_launch_adds_its_runs_to_those_that_are_there(tmp_path):
    run = partial(finished_run, tmp_path)
    first = [run("curriculum", {4: 0.4}), run("labels"), run("one_shot", {4: 0.5})]
    folders = [result["path"] for result in first]
    for number in (1, 2, 3):
        update_results(tmp_path, first[:number], folders)
        assert json.loads((tmp_path / "results.json").read_text()) == first[:number]
    alone = (tmp_path / "results.json").read_bytes()
    second = [run("one_shot", {4: 0.6}, seed=1), first[1] | {"error": "another"}]
    update_results(tmp_path, second[:1], [result["path"] for result in second])
    assert read_results([tmp_path]) == [first[0], first[2], second[0]]  # that of `labels` is being trained again
    update_results(tmp_path, second, [result["path"] for result in second])
    assert read_results([tmp_path]) == [first[0], first[2], *second]
    update_results(tmp_path, first, [*folders, second[0]["path"]])
    assert (tmp_path / "results.json").read_bytes() == alone


def test_runs_of_earlier_launches_are_known_after_a_move_and_forgotten_when_they_are_gone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = [finished_run(Path("out"), name, {4: 0.4}) for name in ("curriculum", "one_shot", "labels")]
    write_results("out", [*results, finished_run(Path("out"), "online")])
    Path("out").rename("new")
    shutil.rmtree("new/one_shot 0")
    kept = earlier_results("new", ["new/labels 0"])
    assert [result["method"] for result in kept] == ["curriculum", "online"]  # a run that broke may leave no folder
    assert kept[0] == results[0]


def test_broken_runs_of_a_method_share_a_row(tmp_path):
    write_results(tmp_path, [finished_run(tmp_path, "one_shot", seed=seed) for seed in (0, 1)])
    assert cells(format_summary(read_results([tmp_path])))["one_shot"][0] == "0 of 2 finite"


def test_a_single_run_stands_for_itself(tmp_path):
    finished_run(tmp_path, "curriculum", {4: 0.4})
    (result,) = read_results([str(tmp_path / "curriculum 0")])
    assert (result["method"], result["samples"], result["steps"], result["finite"]) == ("curriculum", 32, 4, True)
    assert cells(format_summary([result]))["curriculum"][:4] == ["1", "0.4000", "32", "6.00e+01"]


def test_a_run_counts_once_however_often_it_is_named(tmp_path):
    results = [finished_run(tmp_path, "one_shot", {4: 0.4}, seed=seed) for seed in (0, 1)]
    write_results(tmp_path / "all", results)
    folders = [tmp_path / "all", tmp_path / "one_shot 1", tmp_path / "all"]
    assert read_results(folders) == results


@pytest.mark.parametrize("place", ["below", "beside"])
def test_runs_are_found_after_a_move_and_from_another_directory(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "runs/out"
    folder = out if place == "below" else out.parent
    result = finished_run(folder.relative_to(tmp_path), "one_shot", {4: 0.4})
    write_results(out, [result])
    assert read_results(["runs/out"]) == [result]
    out.rename(tmp_path / "runs/new")
    (tmp_path / "runs").rename(tmp_path / "moved")
    (moved,) = read_results([tmp_path / "moved/new"])
    assert moved["path"] == str(tmp_path / "moved" / ("new/one_shot 0" if place == "below" else "one_shot 0"))
    monkeypatch.chdir(tmp_path / "moved/new")
    assert cells(format_summary(read_results(["."])))["one_shot"][1] == "0.4000"


def test_the_files_of_a_trainer_are_those_of_a_single_run(student, teacher, examples, config):
    args = config(max_steps=8, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=4, logging_steps=3)
    trainer = CurriculumDistillationTrainer(
        student, args, train_dataset=examples, eval_dataset=examples[:4], teacher_model=teacher
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    (result,) = read_results([args.output_dir])
    assert (result["method"], result["samples"], result["steps"]) == ("curriculum", 8 * 2 * 4, 8)
    record = json.loads(Path(args.output_dir, "curriculum.json").read_text())
    line = cells(format_summary([result], "eval_kl"))["curriculum"]
    assert line[2:4] == ["64", f"{record['student_flops'] + record['teacher_flops']:.2e}"]  # logs end at step 6


def test_a_run_that_never_saved_its_state_is_its_last_checkpoint_and_a_checkpoint_is_its_run(
    student, teacher, examples, config, caplog
):
    fields = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 3}
    args = config(**fields)
    data = {"train_dataset": examples, "eval_dataset": examples[:4]}
    CurriculumDistillationTrainer(student, args, teacher_model=teacher, **data).train()
    run = Path(args.output_dir)
    (result,) = read_results([run])
    assert (result["path"], result["steps"], result["samples"]) == (str(run / "checkpoint-8"), 8, 8 * 4)
    assert read_results([run / "checkpoint-8"]) == read_results([run, run / "checkpoint-8"]) == [result]
    assert cells(format_summary([result], "eval_kl"))["curriculum"][2] == "32" and not caplog.records
    (run / "checkpoint-8/trainer_state.json").unlink()  # killed while it wrote that one
    (result,) = read_results([run])
    assert (result["path"], result["steps"]) == (str(run / "checkpoint-6"), 6)
    assert [record.getMessage() for record in caplog.records] == [
        f"{run}/checkpoint-6 is where the run is read from: step 6 of 8"
    ]
    write_results(run.parent, [result | {"path": str(run)}])
    assert read_results([run.parent]) == [result]


def test_files_replace_files_but_neither_links_nor_folders(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "results.json.partial").symlink_to(tmp_path / "victim")  # of a killed run, or planted
    write_results(tmp_path, [])
    write_results(tmp_path, [{"method": "a"}])
    assert json.loads((tmp_path / "results.json").read_text()) == [{"method": "a"}]
    (tmp_path / "results.json").unlink()
    (tmp_path / "results.json").mkdir()
    with pytest.raises(IsADirectoryError, match=r"results\.json is a folder, but a file is to be written there"):
        write_results(tmp_path, [])
    assert (tmp_path / "victim").read_text() == "mine"


# ---- which runs are repetitions ----


def runs(folder, *settings):
    """Read the runs of these settings and seeds, each from its own folder."""
    for number, (seed, arguments) in enumerate(settings):
        own = {"seed": seed, "arguments": arguments} if arguments is not None else {}
        finished_run(folder / f"{number}", "one_shot", {4: 0.5}, **own)
    return read_results(sorted(folder.glob("*/*")))


def rows(results):
    return [result["method"] for result in results]


def test_only_runs_that_differ_in_the_seed_alone_share_a_row(tmp_path):
    one = {"learning_rate": 0.1, "layer_order": "last", "stages": None}
    assert rows(runs(tmp_path / "a", (0, one), (1, one), (2, one))) == ["one_shot"] * 3
    other = one | {"learning_rate": 0.2}
    labels = [f"one_shot, learning_rate={rate}" for rate in (0.1, 0.2, 0.1)]
    assert rows(runs(tmp_path / "b", (0, one), (0, other), (1, one))) == labels
    assert cells(format_summary(read_results(sorted(tmp_path.glob("b/*/*")))))[labels[0]][0] == "2"
    third = other | {"layer_order": "together"}
    assert rows(runs(tmp_path / "c", (0, one), (1, third))) == [
        "one_shot, learning_rate=0.1, layer_order=last",
        "one_shot, learning_rate=0.2, layer_order=together",
    ]


def test_many_or_long_differences_are_named_by_the_folder(tmp_path):
    one = dict.fromkeys("abc", 1)
    for name, other in (("many", dict.fromkeys("abc", 2)), ("long", one | {"a": "x" * 21}), ("new", one | {"d": 1})):
        names = rows(runs(tmp_path / name, (0, one), (0, other)))
        assert names == ["one_shot (0/one_shot 0)", "one_shot (1/one_shot 0)"]
    for number, arguments in enumerate((one, dict.fromkeys("abc", 2))):
        of_a_recipe = [
            finished_run(tmp_path / f"r{number}", accuracy={4: 0.5}, seed=seed, arguments=arguments) for seed in (0, 1)
        ]
        write_results(tmp_path / f"r{number}", of_a_recipe)
    assert rows(read_results([tmp_path / "r0", tmp_path / "r1"])) == ["one_shot (r0)"] * 2 + ["one_shot (r1)"] * 2


def test_the_same_seed_again_and_records_without_arguments_have_rows_of_their_own(tmp_path, caplog):
    again = rows(runs(tmp_path / "again", (0, {}), (0, {}), (1, {})))
    assert again == ["one_shot (0/one_shot 0)", "one_shot (1/one_shot 0)", "one_shot (2/one_shot 1)"]
    assert "some of its runs have the seed of others" in caplog.text
    assert len({*rows(runs(tmp_path / "old", (0, None), (1, None), (2, {})))}) == 3
    olds = [finished_run(tmp_path / "one", "one_shot", {4: 0.4}, seed=seed) for seed in (0, 1)]
    write_results(tmp_path / "one", olds)
    assert rows(read_results([tmp_path / "one"])) == ["one_shot"] * 2  # a recipe's runs differ in the seed alone


def test_seeds_that_draw_other_numbers_of_examples_share_a_row_of_one_recipe_alone(tmp_path):
    for folder, first_seed in (("a", 0), ("b", 2)):
        of_a_recipe = [
            finished_run(
                tmp_path / folder, accuracy={4: 0.5}, seed=seed, arguments={}, data={"num_examples": 60 + seed}
            )
            for seed in (first_seed, first_seed + 1)
        ]
        write_results(tmp_path / folder, of_a_recipe)
    assert rows(read_results([tmp_path / "a"])) == ["one_shot"] * 2
    both = rows(read_results([tmp_path / "a", tmp_path / "b"]))
    assert both == ["one_shot (a)"] * 2 + ["one_shot (b)"] * 2


def test_students_teachers_and_batches_tell_runs_apart_as_arguments_do(tmp_path):
    def write(name, config=None, **record):
        finished_run(tmp_path / name, accuracy={4: 0.5}, seed=len(name), arguments={}, **record)
        if config:
            (tmp_path / name / f"one_shot {len(name)}/config.json").write_text(json.dumps(config))

    write("a", {"num_hidden_layers": 2, "transformers_version": "5.17"}, teacher={"name": "x", "fingerprint": "f"})
    write("bb", {"num_hidden_layers": 2, "transformers_version": "5.24"}, teacher={"name": "y", "fingerprint": "f"})
    write("ccc", {"num_hidden_layers": 4}, teacher={"fingerprint": "f"})
    write("dddd", {"num_hidden_layers": 2}, teacher={"fingerprint": "g"})
    read = lambda *names: rows(read_results([next((tmp_path / name).iterdir()) for name in names]))  # noqa: E731
    assert read("a", "bb") == ["one_shot"] * 2
    assert read("a", "bb", "ccc") == [f"one_shot, num_hidden_layers={depth}" for depth in (2, 2, 4)]
    assert read("a", "dddd") == ["one_shot, teacher=f", "one_shot, teacher=g"]


def test_what_a_trainer_records_tells_its_runs_apart(student, teacher, examples, config):
    def run(folder, **fields):
        fields = {"method": "one_shot", "max_steps": 1, "eval_strategy": "steps", "eval_steps": 1} | fields
        args = config(folder, save_strategy="steps", **fields)
        CurriculumDistillationTrainer(
            student, args, train_dataset=examples, eval_dataset=examples[:4], teacher_model=teacher
        ).train()
        return args.output_dir

    folders = [run("a", seed=1), run("b", seed=2, logging_steps=5, per_device_eval_batch_size=3)]
    results = read_results(folders)
    assert rows(results) == ["one_shot"] * 2 and [result["seed"] for result in results] == [1, 2]
    record = json.loads(Path(folders[0], "checkpoint-1/curriculum.json").read_text())
    assert record["arguments"]["learning_rate"] == 1e-3 and folders[0] not in json.dumps(record["arguments"])
    *_, other = read_results([*folders, run("c", seed=3, warmup_steps=1)])
    assert other["method"] == "one_shot, warmup_steps=1"


def test_a_run_that_is_not_finite_counts_with_those_beside_it(tmp_path):
    for name, rate in (("a", 0.1), ("b", 0.2)):
        run = partial(finished_run, tmp_path / name, arguments={"learning_rate": rate})
        write_results(tmp_path / name, [run(accuracy={4: 0.5}, seed=0), run(seed=1)])
    table = cells(format_summary(read_results([tmp_path / "a", tmp_path / "b"])))
    assert [table[f"one_shot, learning_rate={rate}"][0] for rate in (0.1, 0.2)] == ["1 of 2 finite"] * 2


# ---- files that somebody damaged ----

DEEP = functools.reduce(lambda inner, _: [inner], range(300), 1)
VALUES = [None, True, -1, 0, 2.5, "4", "", [], {}, [1], {"a": 1}, math.nan, math.inf, 10**400, 10**29, 1e300, DEEP]
VALUES += ["\0", "..", "\ud800", "\x1b[31m", "a\nb", "x" * 5000]


def places(value, at=()):
    """Of everything in a JSON value: how to get there."""
    yield at
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        yield from places(inner, (*at, key))


@settings(max_examples=150)
@given(data=st.data())
def test_whatever_a_file_holds_it_is_read_or_refused_in_one_line(tmp_path_factory, data):
    out = tmp_path_factory.mktemp("out")
    write_results(out, [finished_run(out, name, {2: 0.2, 4: 0.4}, 1, arguments={"a": 1}) for name in ("a", "b")])
    path = data.draw(st.sampled_from(sorted(out.rglob("*.json"))))
    content = json.loads(path.read_text())
    *way, last = data.draw(st.sampled_from([p for p in places(content) if p]))
    functools.reduce(lambda inner, key: inner[key], way, content)[last] = data.draw(st.sampled_from(VALUES))
    text = json.dumps(content)
    cut = round(data.draw(st.floats(0, 1)) * len(text))
    path.write_text(text[:cut] if data.draw(st.booleans()) else text)
    try:
        table = format_summary(read_results([out]))
    except (ValueError, OSError) as error:
        table = str(error)
        assert not isinstance(error, UnicodeError)
    assert printable(table.replace("\n", "")) == table.replace("\n", "")
