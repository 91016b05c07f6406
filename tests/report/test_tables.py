import functools
import json
import math
import re
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_curriculum_distill import CurriculumDistillationTrainer
from hf_curriculum_distill.report.results import printable, read_results, write_results
from hf_curriculum_distill.report.tables import format_summary, format_table, plot_comparison

LAYERS = {"kl_weight": 0.0, "label_weight": 0.0}
LOGITS = {"kl_weight": 1.0, "label_weight": 0.0}


def finished_run(
    folder, method="one_shot", accuracy=None, layers_until=None, seed=0, steps=4, metric="eval_accuracy", **record
):
    """A run of 8 examples and 15 operations (student 10, teacher 5) a step; 3 (2 and 1) in its layer stage.

    `accuracy` gives the value after each step that was evaluated; a run without any was not finite. `record`: more
    fields of `curriculum.json`, which is otherwise one of an earlier version.
    """
    path = folder / f"{method} {seed}"
    path.mkdir(parents=True)
    result = {"method": method, "seed": seed, "path": str(path), "finite": accuracy is not None}
    if accuracy is None:
        return result | {"error": "kl is nan"}
    history, student, teacher = [], 0.0, 0.0
    for step in range(1, steps + 1):
        in_layers = step <= (layers_until or 0)
        student, teacher = student + (2 if in_layers else 10), teacher + (1 if in_layers else 5)
        history.append({"step": step, "student_flops": student, "teacher_flops": teacher})
        if step in accuracy:
            history.append({"step": step, metric: accuracy[step], f"{metric}_runtime": 1.0, "eval_runtime": 1.0})
    state = {"global_step": steps, "log_history": history}
    (path / "trainer_state.json").write_text(json.dumps(state))
    stages = [LAYERS | {"until": layers_until}] * bool(layers_until) + [LOGITS | {"until": None}]
    record = {"method": method, "samples_per_step": 8, "stages": stages} | ({"seed": seed} if record else {}) | record
    (path / "curriculum.json").write_text(json.dumps(record))
    final = {metric: accuracy[steps]} if steps in accuracy else {}
    totals = {"student_flops": student, "teacher_flops": teacher, "seconds": 3.0}
    return result | final | totals | {"samples": 8 * steps, "steps": steps}


def several_methods(folder):
    """Results of every kind; the comments say when 0.4, the worst end of the baseline, is reached."""
    run = partial(finished_run, folder)
    return [
        run("curriculum", {2: 0.0, 3: 0.4, 4: 0.7}, layers_until=2, seed=0),  # step 3: 24 examples, 6 + 15 operations
        run("curriculum", {2: 0.0, 3: 0.3, 4: 0.5}, layers_until=2, seed=1),  # step 4: 32 examples, 6 + 30 operations
        run("curriculum", seed=2),
        run("one_shot", {1: 0.1, 2: 0.2, 3: 0.5, 4: 0.6}, seed=0),  # step 3
        run("one_shot", {1: 0.1, 2: 0.3, 3: 0.4, 4: 0.5}, seed=1),  # step 3
        run("one_shot", {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4}, seed=2),  # step 4
        *(run("last + hidden", {2: 0.2, 4: end}, seed=seed) for seed, end in enumerate((0.45, 0.4, 0.35))),
        *(run("rarely", {2: 0.2, 4: end}, seed=seed) for seed, end in enumerate((0.45, 0.35))),
        run("too slow", {2: 0.1, 4: 0.2}),
        run("broken"),
    ]


def cells(table):
    """The table's lines, by the first cell; the titles are two blanks apart."""
    return {line.split("  ")[0]: re.split(r"\s{2,}", line.strip())[1:] for line in table.splitlines()}


def test_the_table_has_a_line_a_model_and_aligned_columns(tmp_path):
    metrics = {"eval_agreement": 0.5, "eval_kl": 1.25}
    results = [finished_run(tmp_path, "curriculum", {4: 0.4}) | metrics, {"method": "one_shot", "finite": False}]
    header, rule, first, second = format_table(results).splitlines()
    assert header.split() == ["method", "accuracy", "agreement", "KL", "samples", "FLOPs", "seconds"]
    assert first.split() == ["curriculum", "0.4000", "0.5000", "1.2500", "32", "6.00e+01", "3"]
    assert second.split() == ["one_shot", "-", "-", "-", "-", "-", "-"]
    assert len({len(line) for line in (header, rule, first, second)}) == 1


# ---- files ----


def test_results_are_written_as_a_list_and_read_back(tmp_path):
    results = [finished_run(tmp_path, "curriculum", {4: 0.4}), finished_run(tmp_path, "one_shot")]
    write_results(tmp_path / "new", results)
    assert json.loads((tmp_path / "new/results.json").read_text()) == results
    assert read_results([tmp_path / "new"]) == results


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


# ---- summary ----


def test_the_summary_has_a_line_a_method_over_its_finite_runs(tmp_path):
    table = format_summary(several_methods(tmp_path))
    assert "to reach 0.4 (the lowest final value of one_shot)" in table
    assert "ratio: cost of one_shot / of the method" in table
    never = ["never", "never", "-", "-"]
    expected = {
        "method": ["runs", "eval_accuracy", "samples", "FLOPs", "reach", "samples to reach", "FLOPs to reach",
                   "samples ratio", "FLOPs ratio"],
        # 24 / 28 and 45 / 28.5 with the medians of 24, 32 and of 21, 36
        "curriculum": ["2 of 3 finite", "0.6000 ± 0.1414", "32", "3.60e+01", "2/2", "28", "2.85e+01", "0.86", "1.58"],
        "one_shot": ["3", "0.5000 ± 0.1000", "32", "6.00e+01", "3/3", "24", "4.50e+01", "1.00", "1.00"],
        "last + hidden": ["3", "0.4000 ± 0.0500", "32", "6.00e+01", "2/3", "32", "6.00e+01", "0.75", "0.75"],
        "rarely": ["2", "0.4000 ± 0.0707", "32", "6.00e+01", "1/2", "-", "-", "-", "-"],
        "too slow": ["1", "0.2000", "32", "6.00e+01", "0/1", *never],
        "broken": ["0 of 1 finite", *"--------"],
    }  # fmt: skip
    lines = cells(table)
    assert {name: lines[name] for name in expected} == expected
    assert len({len(line) for line in table.splitlines()[3:]}) == 1


def test_a_given_threshold_is_reached_by_the_first_evaluation_at_least_as_good(tmp_path):
    table = format_summary(several_methods(tmp_path), threshold=0.6)
    assert "to reach 0.6:" in table
    assert cells(table)["curriculum"][4:] == ["1/2", "-", "-", "-", "-"]
    assert cells(table)["one_shot"][4:] == ["1/3", "-", "-", "-", "-"]  # the baseline has no cost to divide
    assert cells(format_summary(several_methods(tmp_path / "b"), threshold=1.0))["one_shot"][5:7] == ["never", "never"]


@pytest.mark.parametrize("metric", ["eval_loss", "eval_kl"])
def test_of_a_loss_less_is_better(tmp_path, metric):
    values = [{2: 3.0, 4: 1.0}, {2: 2.0, 4: 1.5}, {2: 1.5, 4: 2.0}]
    results = [finished_run(tmp_path, "one_shot", values[seed], seed=seed, metric=metric) for seed in (0, 1)]
    results.append(finished_run(tmp_path, "curriculum", values[2], metric=metric))
    table = format_summary(results, metric)
    assert "to reach 1.5 (the highest final value of one_shot)" in table
    assert cells(table)["one_shot"][4:6] == ["2/2", "32"]
    assert cells(table)["curriculum"][4:] == ["1/1", "16", "3.00e+01", "2.00", "2.00"]


def test_a_share_of_nothing_is_no_value_to_reach(tmp_path):
    results = [finished_run(tmp_path, "one_shot", {2: 0.0, 4: 0.0}), finished_run(tmp_path, "a", {2: 0.0, 4: 0.4})]
    table = format_summary(results)
    assert "nothing to reach: 0 (the lowest final value of one_shot) takes no learning; give a threshold" in table
    assert cells(table)["one_shot"][1:] == ["0.0000", "32", "6.00e+01", "-", "-", "-"]
    assert "nothing to reach: 0.0 takes" in format_summary(results, threshold=0.0)
    lines = cells(format_summary(results, threshold=0.1))
    assert (lines["one_shot"][4], lines["a"][4]) == ("0/1", "1/1")
    # 0 is something to reach where values can be negative, and for a loss
    values = {2: -1.0, 4: 0.0}
    correlation = finished_run(tmp_path / "b", accuracy=values, metric="eval_correlation")
    assert cells(format_summary([correlation], "eval_correlation"))["one_shot"][4:6] == ["1/1", "32"]
    loss = finished_run(tmp_path / "c", accuracy={2: 1.0, 4: 0.0}, metric="eval_loss")
    assert cells(format_summary([loss], "eval_loss"))["one_shot"][4:6] == ["1/1", "32"]
    with pytest.raises(ValueError, match="threshold is nan; give a finite value of eval_accuracy"):
        format_summary(results, threshold=float("nan"))


def test_without_the_baseline_there_are_no_ratios_and_every_run_reaches(tmp_path):
    results = [finished_run(tmp_path, name, {4: end}) for name, end in (("a", 0.3), ("b", 0.2))]
    table = format_summary(results)
    assert "ratio" not in table and "to reach 0.2 (the lowest final value of all methods)" in table
    assert [cells(table)[name][4] for name in "ab"] == ["1/1", "1/1"]
    assert cells(format_summary(results, baseline="a"))["b"][4:] == ["0/1", "never", "never", "-", "-"]


def test_the_final_metrics_are_the_last_evaluation_even_where_training_logged_none(tmp_path):
    result = finished_run(tmp_path, "one_shot", {2: 0.2}) | {"eval_accuracy": 0.6}
    assert cells(format_summary([result]))["one_shot"][1:6] == ["0.6000", "32", "6.00e+01", "1/1", "32"]


def test_a_run_may_stop_before_its_last_stage(tmp_path):
    result = finished_run(tmp_path, "curriculum", {4: 0.2}, layers_until=9)
    assert cells(format_summary([result]))["curriculum"][1:4] == ["0.2000", "32", "1.20e+01"]


def test_operations_between_logs_follow_the_stages(tmp_path):
    result = finished_run(tmp_path, "curriculum", {3: 0.4}, layers_until=2)
    path = tmp_path / "curriculum 0/trainer_state.json"
    state = json.loads(path.read_text())
    entries = [entry for entry in state["log_history"] if "student_flops" not in entry or entry["step"] in (2, 4)]
    path.write_text(json.dumps(state | {"log_history": entries}))
    assert cells(format_summary([result]))["curriculum"][2:4] == ["24", "2.10e+01"]
    path.write_text(json.dumps(state | {"log_history": entries[1:]}))  # without step 2, where the stage ends
    with pytest.raises(ValueError, match="no student_flops of step 2, where a stage ends"):
        format_summary([result])


# ---- plot ----


@pytest.mark.parametrize("layers_until", [2, None])
def test_the_plot_draws_every_evaluation_against_samples_and_operations(tmp_path, layers_until):
    results = [
        finished_run(tmp_path, "curriculum", {2: 0.2, 4: 0.4}, layers_until),
        finished_run(tmp_path, "one_shot", {2: 0.2, 4: 0.4}),
        finished_run(tmp_path, "broken"),
    ]
    figure = plot_comparison(results, str(tmp_path / "plot.png"), "title")
    samples, operations = figure.axes
    assert [line.get_xydata().tolist() for line in samples.lines] == [[[16.0, 0.2], [32.0, 0.4]]] * 2
    costs = [[6.0, 36.0] if layers_until else [30.0, 60.0], [30.0, 60.0]]
    assert [line.get_xdata().tolist() for line in operations.lines] == costs
    strips = [(strip.get_x(), strip.get_width()) for axis in figure.axes for strip in axis.patches]
    assert strips == ([(0.0, 16.0), (0.0, 6.0)] if layers_until else [])
    assert [line.get_color() for line in samples.lines] == ["#0072b2", "0.25"]  # the baseline is grey
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["curriculum", "one_shot"]
    assert figure.get_suptitle() == "title" and samples.get_ylabel() == "held-out accuracy"
    assert [axis.get_xscale() for axis in figure.axes] == ["linear", "linear"]
    assert (tmp_path / "plot.png").read_bytes()[1:4] == b"PNG"
    assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_a_method_is_the_mean_and_the_range_of_its_runs_where_all_were_evaluated(tmp_path):
    accuracies = [{1: 0.0, 2: 0.2, 3: 0.6, 4: 0.8}, {2: 0.4, 4: 0.6}]  # at step 3 the second is at 0.5
    results = [finished_run(tmp_path, "one_shot", accuracies[seed], seed=seed) for seed in (0, 1)]
    figure = plot_comparison(results, str(tmp_path / "plot.png"))
    for axis, unit in zip(figure.axes, (8.0, 15.0), strict=True):
        (line,), (band,) = axis.lines, axis.collections
        assert line.get_xdata() == pytest.approx([2 * unit, 3 * unit, 4 * unit])
        assert line.get_ydata() == pytest.approx([0.3, 0.55, 0.7])
        corners = {(round(x / unit), round(float(y), 6)) for x, y in band.get_paths()[0].vertices}
        assert corners == {(2, 0.2), (2, 0.4), (3, 0.5), (3, 0.6), (4, 0.6), (4, 0.8)}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one_shot (2 runs)"]
    assert figure.legends[0].get_title().get_text() == "mean and range over runs"


@pytest.mark.parametrize(("steps", "scale"), [(40, "linear"), (44, "log")])
def test_the_axes_are_logarithmic_when_methods_spend_more_than_ten_times_as_much(tmp_path, steps, scale):
    results = [
        finished_run(tmp_path, "one_shot", {4: 0.4}),
        finished_run(tmp_path, "curriculum", {4: 0.1, steps: 0.4}, layers_until=None, steps=steps),
        finished_run(tmp_path, "last", {4: 0.1}, layers_until=2),
    ]
    figure = plot_comparison(results[:2], str(tmp_path / "plot.png"))
    assert [axis.get_xscale() for axis in figure.axes] == [scale, scale]
    samples, _ = plot_comparison(results, str(tmp_path / "plot.png")).axes
    assert (samples.patches[0].get_x() > 0) == (scale == "log")  # a strip from 0 would have no end


def test_dots_mark_evaluations_that_are_few(tmp_path):
    results = [finished_run(tmp_path, str(n), dict.fromkeys(range(1, n + 1), 0.5), steps=n) for n in (40, 41)]
    figure = plot_comparison(results, str(tmp_path / "plot.png"))
    assert [line.get_marker() for line in figure.axes[0].lines] == ["o", "None"]


def test_another_metric_and_baseline_are_drawn_as_such(tmp_path):
    results = [finished_run(tmp_path, name, {4: 1.0}, metric="eval_kl") for name in ("one_shot", "curriculum")]
    figure = plot_comparison(results, str(tmp_path / "plot.png"), metric="eval_kl", baseline="curriculum")
    assert [line.get_color() for line in figure.axes[0].lines] == ["#0072b2", "0.25"]
    assert figure.axes[0].get_ylabel() == "held-out KL from the teacher (nats)"


def test_names_are_drawn_as_they_are_written(tmp_path):
    names = ["$x^$", "_hidden", "50 % of $3"]
    figure = plot_comparison([finished_run(tmp_path, n, {4: 0.5}) for n in names], str(tmp_path / "plot.png"))
    assert [text.get_text().strip().replace("\\$", "$") for text in figure.legends[0].get_texts()] == names


@pytest.mark.parametrize("length", [30, 60, 300])
def test_the_legend_has_room_for_long_names(tmp_path, length):
    names = [letter + length // 6 * " rate=" for letter in "abcdef"]
    results = [finished_run(tmp_path / name[0], "one_shot", {2: 0.2, 4: 0.5}) | {"method": name} for name in names]
    figure = plot_comparison(results, str(tmp_path / "plot.png"))
    (left, bottom), (right, top) = figure.legends[0].get_window_extent().get_points()
    assert 0 <= left < right <= figure.bbox.width and 0 <= bottom < top <= figure.bbox.height


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_plot_is_not_written_through_a_link(tmp_path, suffix):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / f"plot.{suffix}").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match=rf"plot\.{suffix} is a symbolic link, and what it leads to is not overwritten"):
        plot_comparison([finished_run(tmp_path, accuracy={4: 0.5})], str(tmp_path / "plot.png"))
    assert (tmp_path / "victim").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"one_shot 0", "victim", f"plot.{suffix}"}


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


def test_nothing_is_drawn_of_runs_that_are_not_finite(tmp_path):
    with pytest.raises(ValueError, match="No run is finite"):
        plot_comparison([finished_run(tmp_path)], str(tmp_path / "plot.png"))
