import json
import re
from functools import partial

import pytest

from hf_curriculum_distill.report.tables import format_summary, format_table

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
    header, _, first, second = format_table([results[0] | {"eval_bits_per_byte": 1.5}, results[1]]).splitlines()
    assert header.split()[:3] == ["method", "bits/byte", "accuracy"]
    assert first.split()[:3] == ["curriculum", "1.5000", "0.4000"] and second.split()[1] == "-"


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
