import re

import pytest
from conftest import tiny_bert

from .plans import planned


def test_time_follows_from_rate_processes_and_utilisation(tmp_path):
    student, teacher = tiny_bert(1), tiny_bert(1)
    one = planned(tmp_path, student, teacher, {"flops_per_second": 1e6})
    assert one.total["seconds"] == pytest.approx(one.total["flops"] / 1e6)
    two = planned(tmp_path, student, teacher, {"flops_per_second": 1e6, "num_processes": 2})
    assert two.total["flops"] == 2 * one.total["flops"] and two.total["seconds"] == one.total["seconds"]
    assert two.total["memory"] == one.total["memory"]
    assert planned(tmp_path, student, teacher).total["seconds"] is None
    measured = planned(tmp_path, student, teacher, {"measure": 0.01, "utilisation": 0.25})
    ceiling = float(re.search(r"0.25 .* of (\S+) FLOP/s", measured.assumptions[0])[1])
    assert 1e8 < ceiling < 1e14
    assert measured.total["seconds"] == pytest.approx(measured.total["flops"] / (0.25 * ceiling), rel=0.01)


def test_the_time_on_a_gpu_follows_from_its_peak_in_the_runs_precision(tmp_path):
    student, teacher = tiny_bert(1), tiny_bert(1)
    for fields, peak in (({"use_cpu": False}, 30.3e12), ({"use_cpu": False, "bf16": True}, 121e12)):
        plan = planned(tmp_path, student, teacher, {"gpu": "l4", "utilisation": 0.5}, **fields)
        assert plan.total["seconds"] == pytest.approx(plan.total["flops"] / (0.5 * peak))
        assert plan.assumptions[0].startswith("time: at 0.5 (an assumption: --utilisation) of ")
    assert "bfloat16 peak of its data sheet, without sparsity (L4 24 GB)" in plan.assumptions[0]
    known = planned(tmp_path, student, teacher, {"gpu": "l4", "flops_per_second": 1e6}, use_cpu=False)
    assert known.total["seconds"] == pytest.approx(known.total["flops"] / 1e6)


def test_a_run_on_the_cpu_is_not_planned_on_a_gpu(tmp_path):
    plan = planned(tmp_path, tiny_bert(1), tiny_bert(1), {"gpu": "l4"})
    assert plan.errors == ["machine: gpu is 'l4', but use_cpu is True; leave one of them out."]
