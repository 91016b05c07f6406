"""A curve is a run's evaluations and what each had cost, which the stages and the logs around it say."""

import json

import pytest

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
