"""Losses of hidden states and their gradients against float64 references, written out."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_losses import normal, seeds, sizes, value_and_gradient

from hf_curriculum_distill.hidden_losses import HIDDEN_LOSSES, hidden_state_mse

every_hidden_loss = pytest.mark.parametrize("name", HIDDEN_LOSSES)


@given(
    seed=seeds,
    batch=sizes,
    length=sizes,
    width=sizes,
    mask=st.sampled_from([None, lambda noise: noise > 0, lambda noise: noise.clamp(min=0)]),
)
def test_hidden_state_mse_is_the_slow_weighted_sum_with_its_gradient(seed, batch, length, width, mask):
    student, target = normal(batch, length, width, seed=seed), normal(batch, length, width, seed=seed + 1)
    mask = mask and mask(normal(batch, length, seed=seed + 2))
    expected, gradient = 0.0, torch.zeros_like(student)
    for b in range(batch):
        for i in range(length):
            weight = 1.0 if mask is None else float(mask[b, i])
            for d in range(width):
                error = student[b, i, d].item() - target[b, i, d].item()
                expected += weight * error**2 / width
                gradient[b, i, d] = 2 * weight * error / width
    actual, grad = value_and_gradient(hidden_state_mse, student, target, mask)
    assert actual.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(grad, gradient, rtol=1e-5, atol=1e-6)


def slow_distance(name, student, target):
    """Between two lists of numbers, in float64; and its gradient with respect to the student's, as derived on paper."""
    width = len(student)
    if name == "cosine":
        size, target_size = (math.sqrt(sum(x * x for x in state)) for state in (student, target))
        similarity = sum(x * y for x, y in zip(student, target, strict=True)) / (size * target_size)
        pairs = zip(student, target, strict=True)
        return 1 - similarity, [(similarity * x / size - y / target_size) / size for x, y in pairs]
    if name == "mse":
        errors = [x - y for x, y in zip(student, target, strict=True)]
        return sum(error**2 for error in errors) / width, [2 * error / width for error in errors]
    means = [sum(state) / width for state in (student, target)]
    deviations = [
        math.sqrt(sum((x - m) ** 2 for x in s) / width) for s, m in zip((student, target), means, strict=True)
    ]
    own, other = ([(x - m) / d for x in s] for s, m, d in zip((student, target), means, deviations, strict=True))
    value, through = slow_distance("mse", own, other)
    mean, along = sum(through) / width, sum(g * x for g, x in zip(through, own, strict=True)) / width
    return value, [(g - mean - x * along) / deviations[0] for g, x in zip(through, own, strict=True)]


@every_hidden_loss
@given(
    seed=seeds,
    batch=sizes,
    length=sizes,
    width=st.integers(3, 6),
    mask=st.sampled_from([None, lambda noise: noise > 0, lambda noise: noise.clamp(min=0)]),
)
def test_a_hidden_loss_is_the_slow_weighted_sum_with_its_gradient(name, seed, batch, length, width, mask):
    student, target = normal(batch, length, width, seed=seed), normal(batch, length, width, seed=seed + 1)
    mask = mask and mask(normal(batch, length, seed=seed + 2))
    expected, gradient = 0.0, torch.zeros_like(student)
    for b in range(batch):
        for i in range(length):
            weight = 1.0 if mask is None else float(mask[b, i])
            value, slopes = slow_distance(name, student[b, i].tolist(), target[b, i].tolist())
            expected += weight * value
            gradient[b, i] = weight * torch.tensor(slopes)
    actual, grad = value_and_gradient(HIDDEN_LOSSES[name], student, target, mask)
    assert actual.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    steepest = max(1.0, gradient.abs().max().item())
    torch.testing.assert_close(grad, gradient, rtol=1e-3, atol=1e-5 * steepest)


# each hidden loss, and what may be done to states without its noticing; the losses before it notice
UNNOTICED = {
    "mse": lambda states, size, shift: states,
    "cosine": lambda states, size, shift: size * states,
    "layer_norm_mse": lambda states, size, shift: size * states + shift,
}


@every_hidden_loss
@given(seed=seeds, size=st.sampled_from([1e-3, 0.5, 2.0, 1e3]))
def test_a_hidden_loss_is_zero_iff_states_are_equal_but_for_what_it_leaves_out(name, seed, size):
    target, shift = normal(2, 3, 16, seed=seed), 2 + normal(2, 3, 1, seed=seed + 1).abs()
    left_out = UNNOTICED[name](target, size, size * shift)
    assert HIDDEN_LOSSES[name](left_out, target).item() == pytest.approx(0, abs=1e-5)
    for other in (left_out + 0.5 * left_out.std() * normal(2, 3, 16, seed=seed + 2), left_out.flip(-1), -left_out):
        assert HIDDEN_LOSSES[name](other, target).item() > 0.05
    stricter = list(HIDDEN_LOSSES)[: list(HIDDEN_LOSSES).index(name)]
    assert all(HIDDEN_LOSSES[one](left_out, target).item() > 0.05 for one in stricter)


@pytest.mark.parametrize("name, highest", [("cosine", 2.0), ("layer_norm_mse", 4.0)])
def test_opposite_states_cost_the_most(name, highest):
    target = normal(1, 3, 16, seed=0)
    assert HIDDEN_LOSSES[name](-2 * target, target).item() == pytest.approx(3 * highest, rel=1e-5)


@every_hidden_loss
def test_states_without_direction_or_deviation_have_finite_losses_and_gradients(name):
    target = normal(1, 3, 8, seed=0)
    target[0, 1] = 0.0
    student = torch.zeros(1, 3, 8)
    student[0, 2] = 7.3
    value, gradient = value_and_gradient(HIDDEN_LOSSES[name], student, target)
    assert torch.isfinite(value) and torch.isfinite(gradient).all()


@every_hidden_loss
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_a_padded_position_contributes_neither_value_nor_gradient(name, bad, dtype):
    hidden_loss = HIDDEN_LOSSES[name]
    student, target = normal(2, 4, 8, seed=0), normal(2, 4, 8, seed=1)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1]], dtype=dtype)
    expected = hidden_loss(student[mask.bool()], target[mask.bool()])
    target[~mask.bool()] = bad
    student[1, 1] = bad
    student.requires_grad_()
    loss = hidden_loss(student, target, mask)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    assert (student.grad[~mask.bool()] == 0).all()
    assert torch.isfinite(student.grad).all()
