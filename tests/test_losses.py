"""Losses of logits and their gradients against float64 references, written out or derived on paper."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_curriculum_distill import losses
from hf_curriculum_distill.hidden_losses import HIDDEN_LOSSES
from hf_curriculum_distill.losses import (
    DIVERGENCES,
    TOP_DIVERGENCES,
    cross_entropy,
    entropy,
    hard_label_loss,
    jensen_shannon_divergence,
    kl_divergence,
    top_logits,
)

PROPER = {name: divergence for name, divergence in DIVERGENCES.items() if name != "hard"}  # zero at equality alone
every_divergence = pytest.mark.parametrize("divergence", PROPER.values(), ids=list(PROPER))
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


@pytest.mark.parametrize("name", PROPER)
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


@given(seed=seeds, rows=sizes, classes=st.integers(2, 7), scale=st.sampled_from([0.1, 1.0, 1e4]))
def test_entropy_is_the_slow_sum_and_never_more_for_fewer_outcomes(seed, rows, classes, scale):
    teacher = normal(rows, classes, seed=seed, scale=scale)
    likely = (log_softmax(teacher) / 1).exp()
    expected = -(likely * likely.clamp(min=1e-300).log()).sum(-1)
    torch.testing.assert_close(entropy(teacher).double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(entropy(2 * teacher, 2.0), entropy(teacher))
    for k in range(1, classes):
        assert (entropy(top_logits(teacher, k)) <= entropy(teacher) + 1e-5).all()


@given(seed=seeds, rows=sizes, classes=st.integers(2, 7), tied=st.booleans(), scale=st.sampled_from([0.1, 1.0, 1e4]))
def test_hard_labels_are_a_cross_entropy_with_the_teachers_first_choice(seed, rows, classes, tied, scale):
    student, teacher = normal(rows, classes, seed=seed, scale=scale), normal(rows, classes, seed=seed + 1, scale=scale)
    if tied:  # as logits in bfloat16 often are
        teacher[:, -1] = teacher[:, 0] = teacher.amax(-1) + scale
    choices = torch.tensor([row.index(max(row)) for row in teacher.tolist()])
    chosen = torch.eye(classes).double()[choices]
    expected, gradient = -(chosen * log_softmax(student)).sum(), log_softmax(student).exp() - chosen
    # of two equal classes a cache with room for one may keep either
    for targets in (teacher, *(top_logits(teacher, k) for k in range(1 + tied, classes))):
        actual, grad = value_and_gradient(hard_label_loss, student, targets)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6 * rows * scale)
        torch.testing.assert_close(grad.double(), gradient, rtol=0, atol=1e-6 * scale)


def test_hard_labels_are_the_limit_of_cold_teachers_and_have_no_temperature():
    student, teacher = normal(4, 9, seed=0), normal(4, 9, seed=1)
    cold = (teacher.double() / 1e-20).softmax(-1)  # as in the paper, where the student's temperature is 1
    assert hard_label_loss(student, teacher).item() == pytest.approx(-(cold * log_softmax(student)).sum().item())
    assert torch.equal(hard_label_loss(student, teacher), hard_label_loss(student, 7 * teacher + 3))
    with pytest.raises(ValueError, match=r"temperature is 2\.0, but the hard-label loss has none"):
        hard_label_loss(student, teacher, 2.0)


def test_hard_labels_at_equal_distributions_cost_what_the_first_choice_is_unlikely():
    logits = torch.tensor([[2.0, 0.0, 0.0]]).double()
    expected = -logits.log_softmax(-1)[0, 0].item()
    assert hard_label_loss(logits, logits).item() == pytest.approx(expected) and expected > 0.1
    sure = torch.tensor([[200.0, 0.0, 0.0]])
    assert hard_label_loss(sure, logits).item() == 0.0


@given(seed=seeds, name=st.sampled_from(list(TOP_DIVERGENCES)))
def test_of_the_likeliest_classes_those_losses_can_be_computed_that_are_listed(seed, name):
    student, teacher = normal(4, 7, seed=seed), normal(4, 7, seed=seed + 1)
    whole, own = DIVERGENCES[name](student, teacher), TOP_DIVERGENCES[name](student, top_logits(teacher, 6))
    torch.testing.assert_close(own, whole, rtol=1e-4, atol=1e-5)  # the rest is one class


@pytest.mark.parametrize("loss", [*HIDDEN_LOSSES.values(), *DIVERGENCES.values()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_summed_in_float32(loss, dtype):
    student, teacher = normal(64, 16, 32, seed=0).to(dtype), normal(64, 16, 32, seed=1).to(dtype)
    if loss not in HIDDEN_LOSSES.values():
        student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
    plain = loss(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = loss(student, teacher)
    assert plain.dtype == autocast.dtype == torch.float32
    assert torch.equal(plain, autocast)
    assert plain.item() == pytest.approx(loss(student.float(), teacher.float()).item(), rel=1e-6)


@pytest.mark.parametrize("loss", [*HIDDEN_LOSSES.values(), *DIVERGENCES.values(), cross_entropy])
def test_nothing_counted_is_zero_with_zero_gradient(loss):
    student = torch.zeros(0, 7, requires_grad=True)
    target = torch.zeros(0, dtype=torch.long) if loss is cross_entropy else torch.zeros(0, 7)
    value = loss(student, target)
    value.backward()
    assert value.item() == 0.0
    assert student.grad.shape == (0, 7)
