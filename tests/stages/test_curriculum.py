"""The layer maps, and the stages made of them, are what their names promise."""

import itertools
import math
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_curriculum_distill import StageScheduler
from hf_curriculum_distill.stages import (
    LAYER_ORDERS,
    check_layer_range,
    curriculum_stages,
    parse_layer_pairs,
    resolve_layer_map,
    rising_groups,
)

depths = st.integers(1, 48)


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


@pytest.mark.parametrize("begin, end, kept", [(0.5, 0.0, True), (0.0, 0.5, True), (0.0, None, False)])
def test_the_logit_stage_keeps_the_pairs_whose_weight_is_positive_at_either_end(begin, end, kept):
    logit_stage = {"kl_weight": 1.0, "hidden_weight": begin, "hidden_weight_at_end": end}
    *_, logits = curriculum_stages([(1, 2), (2, 4)], "sequential", 0.5, 1.0, logit_stage)
    assert logits.hidden == (((2, 4),) if kept else ())
    assert (logits.hidden_weight, logits.hidden_weight_at_end) == (begin, end)


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
            "complexity": [(pair,) for pair in pairs],  # as many as there can be, until they are measured
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


# ---- by complexity ----

LAYERS = [(i, 2 * i) for i in range(1, 6)]
measurements = st.integers(1, 4).flatmap(
    lambda draws: st.dictionaries(
        st.sampled_from(LAYERS), st.lists(st.floats(0.01, 2.0), min_size=draws, max_size=draws), min_size=1
    )
)


@given(measurements)
def test_groups_rise_and_neighbours_are_parted_only_where_every_draw_agrees(measured):
    groups = rising_groups(measured)
    kept = sorted(itertools.chain(*groups), key=lambda pair: (fmean(measured[pair]), pair))
    assert kept == sorted(set(kept), key=kept.index) and set(kept) == {p for p in measured if max(measured[p]) < 1}
    assert [pair for group in groups for pair in sorted(group, key=kept.index)] == kept
    assert all(list(group) == sorted(group) for group in groups)
    ends = {max(group, key=kept.index) for group in groups[:-1]}
    for easier, harder in itertools.pairwise(kept):
        assert (easier in ends) == all(map(float.__lt__, measured[easier], measured[harder]))


@given(measurements, st.randoms())
def test_the_order_of_layers_and_draws_does_not_matter(measured, random):
    pairs, draws = list(measured), list(range(len(next(iter(measured.values())))))
    random.shuffle(pairs)
    random.shuffle(draws)
    assert rising_groups({pair: [measured[pair][d] for d in draws] for pair in pairs}) == rising_groups(measured)


@given(st.permutations([0.1, 0.3, 0.5, 0.7, 0.9]), st.floats(0.2, 3.0))
def test_one_draw_orders_by_value_alone_and_no_rising_map_that_keeps_1_changes_it(values, power):
    groups = rising_groups({pair: [value] for pair, value in zip(LAYERS, values, strict=True)})
    assert groups == [(pair,) for _, pair in sorted(zip(values, LAYERS, strict=True))]
    assert groups == rising_groups({pair: [value**power] for pair, value in zip(LAYERS, values, strict=True)})


@pytest.mark.parametrize(
    "measured, groups",
    [
        ([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]], [(0, 1, 2)]),  # equally hard: together
        ([[0.3, 0.6], [0.4, 0.5], [0.6, 0.7]], [(0, 1), (2,)]),  # the draws differ on the first two
        ([[0.9, 0.8], [0.5, 0.5], [0.2, 0.4]], [(2,), (1,), (0,)]),
        ([[0.5, 0.5], [1.0, 1.0], [0.8, 1.1]], [(0,)]),  # as hard as random ones: left out
        ([[0.5, 0.5], [1.2, 1.3], [1.4, 0.9]], [(0,)]),
        ([[1.1, 0.9], [1.0, 1.2], [1.5, 1.5]], []),
        ([[0.7, 1.2], [0.2, 0.3], [0.6, 1.1]], [(1,)]),  # not easier in every draw
    ],
    ids=str,
)
def test_known_groups(measured, groups):
    expected = [tuple(LAYERS[number] for number in group) for group in groups]
    assert rising_groups(dict(zip(LAYERS, measured, strict=False))) == expected


def test_stages_by_complexity_are_the_groups_and_the_last_is_kept_beside_the_logits():
    groups = [((2, 4),), ((1, 2), (3, 6))]
    logit_stage = {"kl_weight": 1.0, "hidden_weight": 1.0}
    stages = curriculum_stages(LAYERS, "complexity", 0.5, 1.0, logit_stage, groups)
    assert [(stage.name, stage.until) for stage in stages] == [
        ("layer 2", 0.25),
        ("layers 1, 3", 0.5),
        ("kl + layers 1, 3", None),
    ]
