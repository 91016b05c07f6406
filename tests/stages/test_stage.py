"""A stage is a finite sum of losses; it knows its name and what it needs."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_curriculum_distill import Stage

fractions = st.floats(0, 1, exclude_min=True, exclude_max=True)
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
        ({"hidden": [[1, 1]], "hidden_weight_at_end": -0.5}, r"Stage.hidden_weight_at_end is -0.5; .* at least 0"),
        ({"hidden": [[1, 1]], "hidden_weight_at_end": "0"}, r"Stage.hidden_weight_at_end is '0'"),
        ({"hidden": [[1, 1]], "hidden_weight": 0, "hidden_weight_at_end": 0}, "A stage needs a loss"),
        ({"kl_weight": 1.0, "hidden_weight_at_end": 0.0}, r"hidden_weight_at_end is 0.0, but `hidden` has no layer"),
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


@pytest.mark.parametrize(
    ("stage", "text"),
    [
        (Stage(hidden=[[1, 2]], until=0.5), "Stage(hidden=((1, 2),), until=0.5)"),
        (Stage(kl_weight=1.0, label_weight=0.5), "Stage(kl_weight=1.0, label_weight=0.5)"),
    ],
)
def test_a_stage_is_shown_as_python_that_makes_it(stage, text):
    assert repr(stage) == text and eval(text) == stage
