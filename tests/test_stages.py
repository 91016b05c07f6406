"""The step -> stage map is a partition; the layer maps are what their names promise."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_curriculum_distill import Stage, StageScheduler
from hf_curriculum_distill.stages import (
    LAYER_ORDERS,
    check_layer_range,
    curriculum_stages,
    parse_layer_pairs,
    resolve_layer_map,
)

depths = st.integers(1, 48)


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


weights = st.one_of(st.floats(), st.floats(0, 2), st.just(0.0))


@given(weights, weights, weights, st.booleans(), st.one_of(st.none(), st.integers(-2, 5), st.floats(), fractions))
def test_a_stage_is_a_finite_sum_of_something_or_is_refused(hidden, kl, label, matched, until):
    fields = {"hidden": [[1, 2]] if matched else [], "hidden_weight": hidden, "kl_weight": kl, "label_weight": label}
    is_sum = all(0 <= weight < math.inf for weight in (hidden, kl, label)) and ((matched and hidden) or kl or label)
    if is_sum and (until is None or (0 < until < 1 if isinstance(until, float) else until >= 1)):
        stage = Stage(**fields, until=until)
        assert (stage.needs_logits, stage.needs_teacher) == (bool(kl or label), bool(matched or kl))
    else:
        with pytest.raises(ValueError):
            Stage(**fields, until=until)


def test_fractions_are_rounded_to_the_nearest_step():
    stages = [Stage(hidden=[(1, 1)], until=0.33), Stage(hidden=[(2, 2)], until=0.67), Stage(kl_weight=1.0)]
    assert StageScheduler(stages, 10).boundaries == (3, 7)
    assert StageScheduler(stages, 1000).boundaries == (330, 670)


@pytest.mark.parametrize(
    "stage, name",
    [
        ({"hidden": [[3, 6]]}, "layer 3"),
        ({"hidden": [[0, 0]]}, "layer 0"),
        ({"hidden": [[1, 2], [2, 4], [3, 6]]}, "layers 1-3"),
        ({"hidden": [[1, 2], [4, 8]]}, "layers 1, 4"),
        ({"kl_weight": 1.0}, "kl"),
        ({"label_weight": 1.0}, "labels"),
        ({"kl_weight": 1.0, "label_weight": 0.5}, "kl + labels"),
        ({"kl_weight": 1.0, "hidden": [[12, 24]]}, "kl + layer 12"),
    ],
)
def test_a_stage_is_named_after_what_it_matches(stage, name):
    assert Stage(**stage).name == name


@pytest.mark.parametrize(
    "stage, logits, teacher",
    [
        ({"hidden": [[3, 6]]}, False, True),
        ({"kl_weight": 1.0}, True, True),
        ({"label_weight": 1.0}, True, False),
        ({"label_weight": 1.0, "hidden": [[1, 1]]}, True, True),
    ],
)
def test_a_stage_knows_what_it_needs(stage, logits, teacher):
    assert (Stage(**stage).needs_logits, Stage(**stage).needs_teacher) == (logits, teacher)


def test_layers_are_the_students_in_order_and_the_teachers_once():
    stage = Stage(hidden=[[2, 4], [1, 4], [3, 2]])
    assert stage.student_layers == (2, 1, 3)
    assert stage.teacher_layers == (2, 4)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({}, "A stage needs a loss"),
        ({"hidden": [[1, 1]], "hidden_weight": 0.0}, "A stage needs a loss"),
        ({"kl_weight": -1.0}, r"Stage.kl_weight is -1.0; .* at least 0"),
        ({"label_weight": math.nan}, r"Stage.label_weight is nan; .* finite"),
        ({"hidden": [[1, 1]], "hidden_weight": math.inf}, r"Stage.hidden_weight is inf; .* finite"),
        ({"kl_weight": "1"}, r"Stage.kl_weight is '1'"),
        ({"kl_weight": 1.0, "until": 1.0}, r"Stage.until is 1.0; .*strictly between 0 and 1"),
        ({"kl_weight": 1.0, "until": 0.0}, r"Stage.until is 0.0; .*strictly between 0 and 1"),
        ({"kl_weight": 1.0, "until": 500.0}, r"Stage.until is 500.0; .* as an int"),
        ({"kl_weight": 1.0, "until": 0}, r"Stage.until is 0; .*at least one optimizer step"),
        ({"kl_weight": 1.0, "until": -3}, r"Stage.until is -3; .*at least one optimizer step"),
        ({"kl_weight": 1.0, "until": True}, r"Stage.until is True; it must be a number of steps"),
        ({"kl_weight": 1.0, "until": "0.5"}, r"Stage.until is '0.5'; it must be a number of steps"),
        ({"hidden": [[1, 1], [1, 2]]}, r"\[\(1, 1\), \(1, 2\)\] name a student layer twice"),
        ({"hidden": [[1]]}, r"\[1\] is not a layer pair"),
        ({"hidden": [[1, 2, 3]]}, r"\[1, 2, 3\] is not a layer pair"),
        ({"hidden": [1, 2]}, r"\[1\] is not a layer pair"),
        ({"hidden": [[1, -2]]}, r"\[1, -2\] is not a layer pair"),
        ({"hidden": [[1, 2.0]]}, r"\[1, 2.0\] is not a layer pair"),
        ({"hidden": [[True, 2]]}, r"\[True, 2\] is not a layer pair"),
        ({"hidden": ["12"]}, r"\['12'\] is not a layer pair"),
    ],
)
def test_a_stage_that_cannot_be_trained_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Stage(**fields)


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


# ---- layer maps ----


@given(depths)
def test_equal_depths_map_to_the_identity(depth):
    identity = tuple((i, i) for i in range(1, depth + 1))
    assert resolve_layer_map("uniform", None, depth, depth) == identity
    assert resolve_layer_map("last", None, depth, depth) == identity


@given(depths, depths, st.data())
def test_named_maps_increase_stay_in_range_and_end_at_the_last_layers(student, teacher, data):
    name = data.draw(st.sampled_from(["uniform", "last"]))
    limit = student if name == "uniform" else min(student, teacher)
    count = data.draw(st.one_of(st.none(), st.integers(1, limit)))
    pairs = resolve_layer_map(name, count, student, teacher)
    assert len(pairs) == (limit if count is None else count)
    assert pairs[-1] == (student, teacher)
    students, teachers = zip(*pairs, strict=True)
    assert all(lower < upper for lower, upper in itertools.pairwise(students))
    strictly = teacher >= student  # a shallower teacher repeats layers
    assert all(lower < upper if strictly else lower <= upper for lower, upper in itertools.pairwise(teachers))
    assert min(students) >= 1 and min(teachers) >= 1
    check_layer_range(pairs, student, teacher)
    assert resolve_layer_map(pairs, None, student, teacher) == pairs
    if name == "uniform":
        assert all(t == math.ceil(s * teacher / student) for s, t in pairs)
        gaps = [upper - lower for lower, upper in itertools.pairwise((0, *students))]
        assert max(gaps) - min(gaps) <= 1
    else:
        assert all(teacher - t == student - s for s, t in pairs)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=4),
    st.one_of(st.none(), st.integers(0, 4)),
    st.booleans(),
)
def test_an_explicit_map_is_taken_as_it_is_or_refused(pairs, count, in_order):
    pairs = sorted(pairs) if in_order else pairs
    steps = list(itertools.pairwise(pairs))
    increases = all(lower < upper for (lower, _), (upper, _) in steps)
    increases = increases and all(lower <= upper for (_, lower), (_, upper) in steps)
    if pairs and count in (None, len(pairs)) and increases:
        assert resolve_layer_map([list(pair) for pair in pairs], count, 3, 4) == tuple(pairs)
    else:
        with pytest.raises(ValueError):
            resolve_layer_map(pairs, count, 3, 4)
    if all(student <= 3 and teacher <= 4 for student, teacher in pairs):
        check_layer_range(pairs, 3, 4)
    else:
        with pytest.raises(ValueError, match="but the"):
            check_layer_range(pairs, 3, 4)


def test_known_maps():
    assert resolve_layer_map("uniform", None, 6, 24) == ((1, 4), (2, 8), (3, 12), (4, 16), (5, 20), (6, 24))
    assert resolve_layer_map("uniform", 3, 6, 24) == ((2, 8), (4, 16), (6, 24))
    assert resolve_layer_map("last", 2, 6, 24) == ((5, 23), (6, 24))


@pytest.mark.parametrize(
    "layer_map, count, message",
    [
        ("first", None, r"layer_map is 'first'; use 'uniform', 'last'"),
        ("uniform", 0, r"num_layer_stages is 0, but layer_map='uniform' has between 1 and 6"),
        ("uniform", 7, r"num_layer_stages is 7.*student: 6 blocks, teacher: 4"),
        ("last", 5, r"num_layer_stages is 5, but layer_map='last' has between 1 and 4"),
        ([], None, "layer_map is an empty list"),
        ([[1, 1], [2, 2]], 3, "num_layer_stages is 3 but layer_map has 2 pairs"),
        ([[2, 2], [1, 3]], None, r"\(2, 2\) before \(1, 3\); a layer map must increase"),
        ([[1, 3], [2, 2]], None, r"\(1, 3\) before \(2, 2\); a layer map must increase"),
        ([[1, 1], [1, 2]], None, "name a student layer twice"),
    ],
)
def test_maps_that_mean_nothing_are_refused(layer_map, count, message):
    with pytest.raises(ValueError, match=message):
        resolve_layer_map(layer_map, count, 6, 4)


def test_layers_count_from_one_and_zero_is_the_embeddings():
    check_layer_range([(0, 0), (6, 12)], 6, 12)
    with pytest.raises(ValueError, match=r"\(7, 12\) names student layer 7, but the student has 6 blocks"):
        check_layer_range([(7, 12)], 6, 12)
    with pytest.raises(ValueError, match=r"\(6, 13\) names teacher layer 13, but the teacher has 12 blocks"):
        check_layer_range([(6, 13)], 6, 12)
    assert parse_layer_pairs([[0, 0], (6, 12)]) == ((0, 0), (6, 12))


@given(st.integers(1, 8), st.sampled_from(LAYER_ORDERS), st.floats(0.05, 0.95), st.booleans())
def test_the_curriculum_shares_its_fraction_and_ends_in_logits(depth, order, fraction, keep_hidden):
    pairs = tuple((i, 2 * i) for i in range(1, depth + 1))
    logit_stage = {"kl_weight": 1.0, "hidden_weight": 0.5 if keep_hidden else 0.0}
    *layers, logits = curriculum_stages(pairs, order, fraction, 0.25, logit_stage)
    assert {stage.hidden_weight for stage in layers} == {0.25}
    matched = [stage.hidden for stage in layers]
    assert (
        matched
        == {
            "sequential": [(pair,) for pair in pairs],
            "cumulative": [pairs[: i + 1] for i in range(depth)],
            "together": [pairs],
            "last": [pairs[-1:]],
        }[order]
    )
    assert [stage.until for stage in layers] == pytest.approx(
        [fraction * (i + 1) / len(layers) for i in range(len(layers))]
    )
    assert not any(stage.needs_logits for stage in layers)
    assert logits.needs_logits and logits.until is None
    assert logits.hidden == (matched[-1] if keep_hidden else ())
    scheduler = StageScheduler([*layers, logits], 1000)
    assert scheduler.boundaries[-1] == round(fraction * 1000)
    lengths = [end - start for start, end in map(scheduler.span, range(len(layers)))]
    assert max(lengths) - min(lengths) <= 2  # both ends are rounded
