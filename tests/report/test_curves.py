"""A curve is a run's evaluations and what each had cost, which the stages and the logs around it say."""

import json

import numpy as np
import pytest

from hf_curriculum_distill.report.curves import Curve, average, read_curves
from hf_curriculum_distill.report.tables import format_summary
from report.test_tables import cells, finished_run


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


# ---- the numbers ----


def curve(*points):
    """A curve of points of examples, operations and value."""
    samples, flops, values = map(np.array, zip(*points, strict=True))
    return Curve(values, np.stack([samples, flops], axis=1), [])


def test_a_value_costs_what_the_first_evaluation_at_least_as_good_had_cost():
    rising_and_falling = curve((8, 1.0, 0.2), (16, 2.0, 0.6), (24, 3.0, 0.4))
    assert rising_and_falling.cost_to_reach(0.6, lower=False).tolist() == [16, 2.0]
    assert rising_and_falling.cost_to_reach(0.3, lower=False).tolist() == [16, 2.0]
    assert rising_and_falling.cost_to_reach(0.7, lower=False).tolist() == [np.inf, np.inf]
    assert rising_and_falling.cost_to_reach(0.4, lower=True).tolist() == [8, 1.0]
    assert rising_and_falling.cost_to_reach(0.2, lower=True).tolist() == [8, 1.0]
    assert rising_and_falling.cost_to_reach(0.1, lower=True).tolist() == [np.inf, np.inf]


def test_runs_are_averaged_wherever_all_have_been_evaluated():
    often = curve((8, 10.0, 0.0), (16, 20.0, 0.2), (24, 30.0, 0.6), (32, 40.0, 0.8))
    rarely = curve((16, 40.0, 0.4), (32, 80.0, 0.6))
    mean, values = average([often, rarely])
    assert mean.costs.tolist() == [[16, 30.0], [24, 45.0], [32, 60.0]]  # at 24 examples the second is at 0.5 after 60
    np.testing.assert_allclose(values, [[0.2, 0.6, 0.8], [0.4, 0.5, 0.6]])
    np.testing.assert_allclose(mean.values, [0.3, 0.55, 0.7])
    assert mean.layer_stages == [] and mean.head_begins.tolist() == [-1, -1]


def test_curves_are_those_of_finite_runs_by_method(tmp_path):
    results = [
        finished_run(tmp_path, "curriculum", {2: 0.2, 4: 0.4}, layers_until=2),
        finished_run(tmp_path, "one_shot", {4: 0.5}),
        finished_run(tmp_path, "one_shot", seed=1),
        finished_run(tmp_path, "broken"),
    ]
    curves = read_curves(results, "eval_accuracy")
    assert {method: len(own) for method, own in curves.items()} == {"curriculum": 1, "one_shot": 1, "broken": 0}
    (own,) = curves["curriculum"]
    assert own.values.tolist() == [0.2, 0.4] and own.costs.tolist() == [[16, 6.0], [32, 36.0]]
    assert [stage.tolist() for stage in own.layer_stages] == [[[0, 0.0], [16, 6.0]]]
    with pytest.raises(ValueError, match=r"has no 'eval_kl'; it was evaluated by eval_accuracy\."):
        read_curves(results, "eval_kl")
