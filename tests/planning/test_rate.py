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
