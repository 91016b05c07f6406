"""The step -> stage map is a partition."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_curriculum_distill import Stage, StageScheduler


@given(st.data(), st.integers(2, 200))
def test_the_stages_partition_the_steps(data, max_steps):
    ends = sorted(data.draw(st.sets(st.integers(1, max_steps - 1), max_size=6)))
    untils = [data.draw(st.sampled_from([end, end / max_steps])) for end in ends]
    stages = [Stage(kl_weight=1.0, label_weight=float(i), until=u) for i, u in enumerate([*untils, None])]
    scheduler = StageScheduler(stages, max_steps)
    assert scheduler.boundaries == tuple(ends)
    spans = [range(*scheduler.span(index)) for index in range(len(stages))]
    assert [step for span in spans for step in span] == list(range(max_steps))
    for step in range(max_steps + 2):  # a finished run needs its last stage, too
        index = sum(end <= step for end in ends)
        assert scheduler.index_at(step) == index
        assert scheduler.stage_at(step) is scheduler.stages[index]
        assert scheduler.stage_at(step).label_weight == float(index)
    assert [stage.until for stage in scheduler.stages] == [*ends, None]
    again = StageScheduler(scheduler.stages, max_steps)
    assert (again.stages, again.boundaries) == (scheduler.stages, scheduler.boundaries)


fractions = st.floats(0, 1, exclude_min=True, exclude_max=True)
ends_of_stages = st.lists(st.one_of(st.integers(1, 32), fractions), max_size=3)


@given(
    st.integers(-1, 30),
    st.one_of(ends_of_stages.map(lambda ends: [*ends, None]), st.lists(st.one_of(st.none(), st.integers(1, 9)))),
)
def test_any_list_of_stages_partitions_the_steps_or_is_refused(max_steps, untils):
    stages = [Stage(kl_weight=1.0, until=until) for until in untils]
    ends = [round(until * max_steps) if isinstance(until, float) else until for until in untils]
    is_plan = max_steps > 0 and ends[-1:] == [None] and None not in ends[:-1]
    if is_plan and all(before < end for before, end in itertools.pairwise([0, *ends[:-1], max_steps])):
        assert StageScheduler(stages, max_steps).boundaries == tuple(ends[:-1])
    else:
        with pytest.raises(ValueError):
            StageScheduler(stages, max_steps)


def test_fractions_are_rounded_to_the_nearest_step():
    stages = [Stage(hidden=[(1, 1)], until=0.33), Stage(hidden=[(2, 2)], until=0.67), Stage(kl_weight=1.0)]
    assert StageScheduler(stages, 10).boundaries == (3, 7)
    assert StageScheduler(stages, 1000).boundaries == (330, 670)


KL = {"kl_weight": 1.0}


@pytest.mark.parametrize(
    "untils, max_steps, message",
    [
        ([], 10, "list of stages is empty"),
        ([None], 0, "max_steps is 0; .* must be positive"),
        ([None], -1, "max_steps is -1"),
        ([5], 10, "The last stage has until=5"),
        ([None, None], 10, r"stages\[0\].until is missing; only the last"),
        ([800, 500, None], 1000, r"stages\[1\].until is 500 \(step 500 of 1000\) but stages\[0\] ends at 800"),
        ([500, 500, None], 1000, r"stages\[1\].until is 500 .*increase by at least one step"),
        ([0.5, 0.5, None], 10, r"stages\[1\].until is 0.5 \(step 5 of 10\) but stages\[0\] ends at 5"),
        ([0.01, None], 10, r"stages\[0\].until is 0.01 \(step 0 of 10\) but training starts at 0"),
        ([0.99, None], 10, r"stages\[0\].until is 0.99 \(step 10\) but max_steps is 10"),
        ([10, None], 10, r"stages\[0\].until is 10 \(step 10\) but max_steps is 10, which leaves nothing"),
        ([11, None], 10, r"stages\[0\].until is 11 \(step 11\) but max_steps is 10"),
    ],
)
def test_boundaries_that_do_not_partition_are_refused(untils, max_steps, message):
    with pytest.raises(ValueError, match=message):
        StageScheduler([Stage(**KL, until=until) for until in untils], max_steps)


@given(st.integers(1, 40), st.integers(0, 39), st.floats(0, 9), st.floats(0, 9))
def test_a_hidden_weight_changes_linearly_within_its_stage_alone(max_steps, first, begin, end):
    annealed = Stage(hidden=[[2, 4]], hidden_weight=begin, kl_weight=1.0, hidden_weight_at_end=end)
    before = [Stage(hidden=[[1, 2]], hidden_weight=3.0, until=first)] if 0 < first < max_steps else []
    scheduler = StageScheduler([*before, annealed], max_steps)
    first = first if before else 0
    seen = {step: scheduler.stage_at(step) for step in reversed(range(max_steps))}  # a function of the step alone
    assert all(seen[step].hidden_weight == 3.0 for step in range(first))
    weights = [seen[step].hidden_weight for step in range(first, max_steps)]
    line = [begin + (end - begin) * i / len(weights) for i in range(len(weights))]
    assert weights == pytest.approx(line, rel=1e-12, abs=1e-12) and weights[0] == begin
    assert scheduler.stage_at(max_steps).hidden_weight == pytest.approx(end)  # evaluations after the last step
    assert {dataclasses.replace(seen[step], hidden_weight=begin) for step in range(first, max_steps)} == {annealed}


def test_a_scheduler_is_shown_as_python_that_makes_it():
    scheduler = StageScheduler([Stage(hidden=[[1, 2]], until=0.5), Stage(kl_weight=1.0)], max_steps=10)
    again = eval(repr(scheduler))
    assert (again.stages, again.max_steps) == (scheduler.stages, 10) and "until=5)" in repr(scheduler)
