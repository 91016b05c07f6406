"""Losses and their gradients against float64 references, written out or derived on paper."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_curriculum_distill import losses
from hf_curriculum_distill.losses import (
    DIVERGENCES,
    cross_entropy,
    hidden_state_mse,
    jensen_shannon_divergence,
    kl_divergence,
)

every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=list(DIVERGENCES))
seeds, sizes = st.integers(0, 10**6), st.integers(1, 5)


def normal(*shape, seed, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def log_softmax(logits, temperature=1.0):
    logits = logits.double() / temperature
    return logits - torch.logsumexp(logits, -1, keepdim=True)


def slow_divergence(name, student, teacher, temperature):
    """The sum over rows and its gradient with respect to the student's logits, as derived on paper, in float64."""
    log_q, log_p = log_softmax(student, temperature), log_softmax(teacher, temperature)
    q, p = log_q.exp(), log_p.exp()
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    against = log_p if name == "reverse_kl" else log_m
    from_q = (q * (log_q - against)).sum(-1, keepdim=True)
    gradient = q * (log_q - against - from_q)
    if name == "forward_kl":
        value, gradient = (p * (log_p - log_q)).sum(), q - p
    elif name == "reverse_kl":
        value = from_q.sum()
    else:
        value, gradient = ((p * (log_p - log_m)).sum() + from_q.sum()) / 2, gradient / 2
    return temperature**2 * value, temperature * gradient


def value_and_gradient(loss, student, *args):
    student = student.clone().requires_grad_()
    value = loss(student, *args)
    value.backward()
    return value.detach(), student.grad


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


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_a_padded_position_contributes_neither_value_nor_gradient(bad, dtype):
    student, target = normal(2, 4, 8, seed=0), normal(2, 4, 8, seed=1)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1]], dtype=dtype)
    expected = hidden_state_mse(student[mask.bool()], target[mask.bool()])
    target[~mask.bool()] = bad
    student.requires_grad_()
    loss = hidden_state_mse(student, target, mask)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    assert (student.grad[~mask.bool()] == 0).all()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("name", DIVERGENCES)
@given(
    seed=seeds,
    rows=sizes,
    classes=st.integers(1, 6),
    temperature=st.floats(0.3, 5.0),
    scale=st.sampled_from([0.1, 1.0, 10.0, 1e4]),
)
def test_divergences_and_their_gradients_are_those_derived_on_paper(name, seed, rows, classes, temperature, scale):
    student, teacher = normal(rows, classes, seed=seed, scale=scale), normal(rows, classes, seed=seed + 1, scale=scale)
    value, gradient = slow_divergence(name, student, teacher, temperature)
    actual, grad = value_and_gradient(DIVERGENCES[name], student, teacher, temperature)
    # a float32 logit divided by the temperature is exact to this part of its size, hence so is its probability
    exact = 1e-6 * (1 + scale / temperature)
    torch.testing.assert_close(actual.double(), value, rtol=exact, atol=exact * rows * temperature**2)
    torch.testing.assert_close(
        grad.double(), gradient, rtol=0, atol=exact * (temperature + gradient.abs().max().item())
    )


@every_divergence
@given(seed=seeds, rows=st.integers(0, 9), classes=st.integers(1, 7), chunk=st.integers(1, 40))
def test_rows_in_chunks_have_the_sum_and_gradient_of_all_rows_at_once(divergence, seed, rows, classes, chunk):
    student, teacher = normal(rows, classes, seed=seed), normal(rows, classes, seed=seed + 1)
    whole, whole_gradient = value_and_gradient(divergence, student, teacher, 2.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "_LOGITS_PER_CHUNK", chunk)
        split, gradient = value_and_gradient(divergence, student, teacher, 2.0)
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, whole_gradient, rtol=1e-5, atol=1e-7)


def test_more_logits_than_a_chunk_holds_are_summed_and_differentiated():
    student, teacher = (normal(3, losses._LOGITS_PER_CHUNK // 2 + 1, seed=seed) for seed in (0, 1))
    value, gradient = slow_divergence("forward_kl", student, teacher, 1.0)
    actual, grad = value_and_gradient(kl_divergence, student, teacher)
    torch.testing.assert_close(actual.double(), value, rtol=1e-4, atol=0)
    torch.testing.assert_close(grad.double(), gradient, rtol=1e-3, atol=1e-10)


@every_divergence
@given(seed=seeds, shift=st.floats(-20, 20), temperature=st.floats(0.3, 5.0))
def test_divergences_are_zero_at_equal_distributions(divergence, seed, shift, temperature):
    logits = normal(3, 5, seed=seed)
    assert divergence(logits, logits, temperature).item() == pytest.approx(0, abs=1e-6 * temperature**2)
    assert divergence(logits + shift, logits, temperature).item() == pytest.approx(0, abs=1e-5 * temperature**2)


@every_divergence
@given(seed=seeds, temperature=st.floats(1.0, 5.0), row=st.integers(0, 2), column=st.integers(0, 4))
def test_divergences_are_positive_at_different_distributions(divergence, seed, temperature, row, column):
    teacher = normal(3, 5, seed=seed)
    student = teacher.clone()
    student[row, column] += 1.0
    assert divergence(student, teacher, temperature).item() > 1e-5


def test_the_gradient_keeps_its_size_when_the_temperature_rises():
    teacher = normal(4, 50, seed=1, scale=0.1)
    norms = []
    for temperature in (10.0, 100.0):
        student = normal(4, 50, seed=0, scale=0.1).requires_grad_()
        kl_divergence(student, teacher, temperature).backward()
        norms.append(student.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.02)


@given(seed=seeds, temperature=st.floats(0.3, 5.0), scale=st.floats(0.1, 40.0))
def test_jensen_shannon_is_symmetric_and_at_most_log_two(seed, temperature, scale):
    student, teacher = normal(3, 5, seed=seed, scale=scale), normal(3, 5, seed=seed + 1, scale=scale)
    forward = jensen_shannon_divergence(student, teacher, temperature).item()
    assert forward == pytest.approx(jensen_shannon_divergence(teacher, student, temperature).item(), rel=1e-5, abs=1e-6)
    assert forward <= 3 * math.log(2) * temperature**2 * (1 + 1e-5)


@given(
    seed=seeds,
    rows=sizes,
    classes=st.integers(1, 6),
    smoothing=st.sampled_from([0.0, 0.1]),
    scale=st.sampled_from([1.0, 1e4]),
)
def test_cross_entropy_is_the_slow_sum_with_its_gradient(seed, rows, classes, smoothing, scale):
    logits = normal(rows, classes, seed=seed, scale=scale)
    labels = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))
    targets = (1 - smoothing) * torch.eye(classes).double()[labels] + smoothing / classes
    expected, gradient = -(targets * log_softmax(logits)).sum(), log_softmax(logits).exp() - targets
    actual, grad = value_and_gradient(cross_entropy, logits, labels, smoothing)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6 * rows * scale)
    torch.testing.assert_close(grad.double(), gradient, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("loss", [hidden_state_mse, *DIVERGENCES.values()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_summed_in_float32(loss, dtype):
    student, teacher = normal(64, 16, 32, seed=0).to(dtype), normal(64, 16, 32, seed=1).to(dtype)
    if loss is not hidden_state_mse:
        student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
    plain = loss(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = loss(student, teacher)
    assert plain.dtype == autocast.dtype == torch.float32
    assert torch.equal(plain, autocast)
    assert plain.item() == pytest.approx(loss(student.float(), teacher.float()).item(), rel=1e-6)


@pytest.mark.parametrize("loss", [hidden_state_mse, *DIVERGENCES.values(), cross_entropy])
def test_nothing_counted_is_zero_with_zero_gradient(loss):
    student = torch.zeros(0, 7, requires_grad=True)
    target = torch.zeros(0, dtype=torch.long) if loss is cross_entropy else torch.zeros(0, 7)
    value = loss(student, target)
    value.backward()
    assert value.item() == 0.0
    assert student.grad.shape == (0, 7)
