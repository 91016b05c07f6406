"""Losses against float64 references written out position by position."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_curriculum_distill.losses import (
    DIVERGENCES,
    cross_entropy,
    hidden_state_mse,
    jensen_shannon_divergence,
    kl_divergence,
    reverse_kl_divergence,
)

every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=list(DIVERGENCES))
seeds, sizes = st.integers(0, 10**6), st.integers(1, 5)
settings.register_profile("tests", deadline=None, max_examples=40)
settings.load_profile("tests")


def normal(*shape, seed, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def softmax(logits):
    powers = [math.exp(logit - max(logits)) for logit in logits]
    return [power / sum(powers) for power in powers]


def slow_kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def slow_divergence(name, student, teacher, temperature):
    total = 0.0
    for ours, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        q, p = (softmax([logit / temperature for logit in row]) for row in (ours, theirs))
        mixture = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        total += {
            "forward_kl": slow_kl(p, q),
            "reverse_kl": slow_kl(q, p),
            "jensen_shannon": (slow_kl(p, mixture) + slow_kl(q, mixture)) / 2,
        }[name]
    return temperature**2 * total


@given(seed=seeds, batch=sizes, length=sizes, width=sizes, masked=st.booleans())
def test_hidden_state_mse_is_the_slow_sum(seed, batch, length, width, masked):
    student, target = normal(batch, length, width, seed=seed), normal(batch, length, width, seed=seed + 1)
    mask = normal(batch, length, seed=seed + 2) > 0 if masked else None
    expected = 0.0
    for b in range(batch):
        for i in range(length):
            if mask is None or mask[b, i]:
                pairs = zip(student[b, i].tolist(), target[b, i].tolist(), strict=True)
                expected += sum((x - y) ** 2 for x, y in pairs) / width
    assert hidden_state_mse(student, target, mask).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@given(seed=seeds, weight=st.floats(0, 3))
def test_position_weights_multiply_the_error(seed, weight):
    student, target = normal(2, 3, 4, seed=seed), normal(2, 3, 4, seed=seed + 1)
    whole = hidden_state_mse(student, target).item()
    assert hidden_state_mse(student, target, torch.full((2, 3), weight)).item() == pytest.approx(
        weight * whole, rel=1e-5
    )


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
    classes=st.integers(2, 6),
    temperature=st.floats(0.3, 5.0),
    scale=st.floats(0.1, 5.0),
)
def test_divergences_are_the_slow_sums(name, seed, rows, classes, temperature, scale):
    student, teacher = normal(rows, classes, seed=seed, scale=scale), normal(rows, classes, seed=seed + 1, scale=scale)
    expected = slow_divergence(name, student, teacher, temperature)
    actual = DIVERGENCES[name](student, teacher, temperature).item()
    assert actual == pytest.approx(expected, rel=1e-4, abs=2e-6 * rows * temperature**2)


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


@every_divergence
@given(seed=seeds, temperature=st.floats(0.5, 4.0))
def test_temperature_divides_logits_and_its_square_multiplies(divergence, seed, temperature):
    student, teacher = normal(3, 5, seed=seed), normal(3, 5, seed=seed + 1)
    expected = temperature**2 * divergence(student / temperature, teacher / temperature).item()
    assert divergence(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


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


@given(seed=seeds)
def test_reverse_kl_is_forward_kl_with_the_models_exchanged(seed):
    student, teacher = normal(3, 5, seed=seed), normal(3, 5, seed=seed + 1)
    assert reverse_kl_divergence(student, teacher, 2.0) == kl_divergence(teacher, student, 2.0)


@every_divergence
def test_extreme_logits_stay_finite_with_finite_gradients(divergence):
    student = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 1e4]], requires_grad=True)
    loss = divergence(student, torch.tensor([[-1e4, 1e4, 0.0], [0.0, 0.0, 1e4]]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


@given(seed=seeds, rows=sizes, classes=st.integers(2, 6), smoothing=st.sampled_from([0.0, 0.1]))
def test_cross_entropy_is_the_slow_sum(seed, rows, classes, smoothing):
    logits = normal(rows, classes, seed=seed)
    labels = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))
    expected = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        logs = [math.log(p) for p in softmax(row)]
        expected -= (1 - smoothing) * logs[label] + smoothing * sum(logs) / classes
    assert cross_entropy(logits, labels, smoothing).item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


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
