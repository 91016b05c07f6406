"""How many examples a method needs: budgets, slopes, the table and the plot."""

import math
from itertools import pairwise

import pytest

from hf_curriculum_distill.report.scaling import (
    Slope,
    budgets,
    fit_slope,
    format_scaling,
    plot_scaling,
    slope_of,
    summarize_searches,
)


def record(method, dimension, samples, seed=0, reached=True, last=False, sparsity=4):
    size = {"dimension": dimension, "sparsity": sparsity}
    return {**size, "method": method, "seed": seed, "samples": samples, "reached": reached, "last": last}


def searches(power):
    """A method whose samples grow as a power of the dimension, after two budgets that were too small."""
    for dimension in (16, 32, 64):
        for seed in (0, 1):
            yield record("curriculum", dimension, 10, seed, reached=False)
            yield record("curriculum", dimension, dimension**power, seed)


def test_budgets_grow_by_the_square_root_of_two_up_to_the_largest():
    steps = budgets(50, 6250)
    assert steps[-1] == 6250 and steps[0] == pytest.approx(50, rel=0.2)
    assert all(later / earlier == pytest.approx(math.sqrt(2), rel=0.02) for earlier, later in pairwise(steps))
    assert budgets(7, 7) == [7]
    with pytest.raises(ValueError, match="The shortest training has 8 steps, the longest 7"):
        budgets(8, 7)


@pytest.mark.parametrize("power", [1, 2, 3])
def test_the_slope_of_a_power_is_its_exponent(power):
    found = summarize_searches(searches(power))
    assert slope_of(found["curriculum"], 0) == pytest.approx(Slope(power, 0), abs=1e-9)


def test_the_slope_of_an_exponential_is_its_octaves_a_bit():
    records = [record("labels", 50, 100 * 8**k, sparsity=k) for k in (2, 3, 4)]
    assert slope_of(summarize_searches(records)["labels"], 1) == pytest.approx(Slope(3, 0), abs=1e-9)


def test_the_error_of_a_slope_is_that_of_least_squares():
    # y = 0, 1, 1: slope 1/2, residuals -1/6, 1/3, -1/6, whose squares sum to 1/6, over 1 degree of freedom and 2
    assert fit_slope([0.0, 1.0, 2.0], [0.0, 1.0, 1.0]) == pytest.approx(Slope(0.5, math.sqrt(1 / 12)))
    assert fit_slope([1.0, 1.0, 1.0], [0.0, 1.0, 2.0]) is None and fit_slope([1.0, 2.0], [0.0, 1.0]) is None


def test_a_search_that_failed_is_no_number_and_in_no_slope(tmp_path):
    records = [*searches(2), record("labels", 16, 300), record("labels", 32, 400, reached=False, last=True)]
    records.append(record("labels", 64, 100, reached=False))  # goes on
    assert summarize_searches(records)["labels"] == {(16, 4): [300], (32, 4): [math.inf]}
    table = [line.split("  ") for line in format_scaling(records, 2, 0).splitlines()]
    rows = {line[0].strip(): [cell.strip() for cell in line[1:] if cell.strip()] for line in table}
    assert rows["(16, 4)"] == ["256", "300 [1 of 1]"]
    assert rows["(32, 4)"] == ["1,024", "not within budget [0 of 1]"]
    assert rows["(64, 4)"] == ["4,096", "not finished"]
    assert rows["samples ~ d^c"] == ["c = 2.00 ± 0.00", "-"]
    figure = plot_scaling(records, str(tmp_path / "scaling.png"), 0)
    assert {path.name for path in tmp_path.iterdir()} == {"scaling.png", "scaling.svg"}
    [axis] = figure.axes
    failed = [line for line in axis.lines if line.get_marker() == "^"]
    assert [(*line.get_xdata(), *line.get_ydata()) for line in failed] == [(32, 400)]
