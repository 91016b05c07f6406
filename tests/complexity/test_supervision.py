"""Supervision complexity: what holds of every kernel, by enumeration and by hand."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_curriculum_distill import margin_bound, supervision_complexity
from hf_curriculum_distill.complexity import relative_complexity

seeds = st.integers(0, 2**32 - 1)


def random_kernel(n, seed=0):
    """A positive definite kernel whose eigenvalues differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    directions, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return directions * torch.logspace(1, -2, n, dtype=torch.float64) @ directions.T


def random_targets(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seeds)
def test_the_value_is_that_of_an_explicit_inverse(seed):
    kernel, targets = random_kernel(6, seed), random_targets(6, seed=seed)
    shifted = kernel + 1e-3 * kernel.trace() / 6 * torch.eye(6)
    expected = float(targets @ torch.linalg.inv(shifted) @ targets)
    plain = supervision_complexity(kernel, targets, adjusted=False, ridge=1e-3)
    adjusted = supervision_complexity(kernel, targets, ridge=1e-3)
    assert plain.value == pytest.approx(expected, rel=1e-6)
    assert adjusted.value == pytest.approx(math.sqrt(expected * float(kernel.trace())) / 6, rel=1e-6)


@given(seeds, st.sampled_from([0.0, 1e-6, 1e-2, 1.0]))
def test_random_signs_have_a_mean_square_of_at_least_one_over_one_plus_the_ridge(seed, ridge):
    """Over all 2^n signs the mean of `y^T K^-1 y` is `Tr K^-1`, and `Tr K * Tr K^-1 >= n^2`."""
    kernel = random_kernel(5, seed) + 1e-3 * torch.eye(5)
    values = [
        supervision_complexity(kernel, torch.tensor(signs), ridge=ridge).value
        for signs in itertools.product([-1.0, 1.0], repeat=5)
    ]
    inverse = torch.linalg.inv(kernel + ridge * kernel.trace() / 5 * torch.eye(5))
    mean_square = sum(value**2 for value in values) / len(values)
    assert mean_square == pytest.approx(float(kernel.trace() * inverse.trace()) / 25, rel=1e-6)
    assert mean_square >= 1 / (1 + ridge) - 1e-12


def test_every_sign_costs_one_where_all_directions_are_alike():
    """Equality holds for a multiple of the identity, and there alone."""
    for signs in itertools.product([-1.0, 1.0], repeat=4):
        assert supervision_complexity(3 * torch.eye(4), torch.tensor(signs), ridge=0).value == pytest.approx(1)


@given(seeds, st.floats(1e-6, 1e6))
def test_the_scale_of_the_kernel_is_of_no_account_and_the_targets_scale_the_value(seed, scale):
    kernel, targets = random_kernel(6, seed), random_targets(6, 2, seed=seed)
    value = supervision_complexity(kernel, targets)
    assert supervision_complexity(scale * kernel, targets) == pytest.approx(value, rel=1e-6)
    assert supervision_complexity(kernel, -scale * targets).value == pytest.approx(scale * value.value, rel=1e-6)


@given(seeds)
def test_targets_along_the_first_eigenvectors_cost_less(seed):
    kernel = random_kernel(6, seed)
    eigenvalues, eigenvectors = torch.linalg.eigh(kernel)
    costs = [supervision_complexity(kernel, vector, adjusted=False).value for vector in eigenvectors.T]
    assert costs == sorted(costs, reverse=True)
    shift = 1e-6 * float(kernel.trace()) / 6
    assert costs == pytest.approx([1 / (float(value) + shift) for value in eigenvalues], rel=1e-5)


@given(seeds)
def test_examples_in_another_order_are_as_complex(seed):
    kernel, targets, order = random_kernel(6, seed), random_targets(6, seed=seed), torch.randperm(6)
    moved = supervision_complexity(kernel[order][:, order], targets[order])
    assert moved == pytest.approx(supervision_complexity(kernel, targets), rel=1e-6)


@pytest.mark.parametrize("adjusted", [True, False])
def test_one_kernel_for_all_outputs_is_the_block_kernel_with_none_between_them(adjusted):
    kernel, targets = random_kernel(5), random_targets(5, 3)
    block = torch.kron(kernel, torch.eye(3, dtype=torch.float64))  # output a of row i is 3 i + a
    shared = supervision_complexity(kernel, targets, adjusted)
    assert supervision_complexity(block, targets, adjusted) == pytest.approx(shared, rel=1e-8)
    assert supervision_complexity(kernel.expand(3, 5, 5), targets, adjusted) == pytest.approx(shared, rel=1e-8)
    each = [supervision_complexity(kernel, targets[:, a], adjusted).value for a in range(3)]
    if adjusted:
        assert shared.value == pytest.approx(math.sqrt(sum(one**2 for one in each) / 3))
    else:
        assert shared.value == pytest.approx(sum(each))


def test_each_output_is_inverted_with_its_own_kernel():
    kernels, targets = torch.stack([torch.eye(2), 4 * torch.eye(2)]), torch.ones(2, 2)
    value = supervision_complexity(kernels, targets, adjusted=False, ridge=0).value
    assert value == pytest.approx(2 / 1 + 2 / 4)
    adjusted = supervision_complexity(kernels, targets, ridge=0).value
    assert adjusted == pytest.approx(math.sqrt(2.5 * (2 + 8)) / 4)


@given(seeds)
def test_the_value_falls_as_the_ridge_rises_and_says_by_how_much(seed):
    kernel, targets = random_kernel(6, seed), random_targets(6, seed=seed)
    given = supervision_complexity(kernel, targets, ridge=1e-4)
    assert given.at_tenth_ridge >= given.value >= given.at_tenfold_ridge
    assert given.at_tenth_ridge == pytest.approx(supervision_complexity(kernel, targets, ridge=1e-5).value)
    assert given.at_tenfold_ridge == pytest.approx(supervision_complexity(kernel, targets, ridge=1e-3).value)


def test_a_kernel_of_too_low_a_rank_shows_in_the_sensitivity():
    """Outside of what the kernel spans, it is the ridge alone that is inverted: ten times less, ten times the norm."""
    kernel = torch.ones(4, 4)
    fits, fits_not = torch.ones(4), torch.tensor([1.0, -1.0, 0.0, 0.0])
    assert supervision_complexity(kernel, fits).at_tenth_ridge == pytest.approx(0.5, rel=1e-5)
    value = supervision_complexity(kernel, fits_not, adjusted=False)
    assert value.at_tenth_ridge / value.value == pytest.approx(10, rel=1e-3)


def test_targets_may_be_whole_numbers():
    kernel, targets = torch.eye(3), torch.tensor([1, -1, 2])
    assert supervision_complexity(kernel, targets, adjusted=False, ridge=0).value == 6


@pytest.mark.parametrize(
    ("kernel", "targets", "error"),
    [
        (torch.ones(2, 3), torch.ones(2), r"A kernel \[2, 3\] and targets \[2, 1\] do not match; give \[n \* d"),
        (torch.eye(3), torch.ones(2), r"A kernel \[3, 3\] and targets \[2, 1\] do not match"),
        (torch.eye(2).expand(3, 2, 2), torch.ones(2, 2), r"A kernel \[3, 2, 2\] and targets \[2, 2\] do not match"),
        (torch.eye(2), torch.ones(2, 1, 1), r"targets \[2, 1, 1\] do not match"),
        (torch.eye(0), torch.ones(0), r"targets \[0, 1\] do not match"),
        (torch.eye(2) + torch.tensor([[0.0, 0.1], [0.0, 0.0]]), torch.ones(2), "The kernel is not symmetric"),
        (torch.full((2, 2), math.nan), torch.ones(2), "The kernel or the targets are not finite"),
        (torch.eye(2), torch.tensor([1.0, math.inf]), "The kernel or the targets are not finite"),
        (torch.zeros(2, 2), torch.ones(2), r"The kernel's trace is 0.0"),
        (torch.diag(torch.tensor([1.0, -0.5])), torch.ones(2), "is not positive definite, so it has no inverse"),
    ],
)
def test_what_is_no_kernel_of_the_targets_is_refused(kernel, targets, error):
    with pytest.raises(ValueError, match=error):
        supervision_complexity(kernel, targets)


@pytest.mark.parametrize("ridge", [-1e-6, math.nan, math.inf])
def test_a_ridge_is_a_positive_number(ridge):
    with pytest.raises(ValueError, match=f"ridge is {ridge}; it is added"):
        supervision_complexity(torch.eye(2), torch.ones(2), ridge=ridge)


def test_without_a_ridge_a_singular_kernel_has_no_inverse():
    with pytest.raises(ValueError, match="not positive definite"):
        supervision_complexity(torch.ones(2, 2), torch.ones(2), ridge=0)


def test_the_margin_bound_is_the_sum_of_its_three_terms():
    margins = torch.tensor([-1.0, 0.5, 0.6, 2.0])
    expected = 2 / 4 + 2 * 3.0 / (0.5 * 4) * math.sqrt(16.0) + 3 * math.sqrt(math.log(2 / 0.1) / 8)
    assert margin_bound(margins, trace=16.0, norm=3.0, gamma=0.5, delta=0.1) == pytest.approx(expected)


def test_the_bounds_second_term_is_the_adjusted_complexity_for_what_fits_the_labels():
    kernel, signs = random_kernel(8), torch.tensor([1.0, -1.0] * 4)
    norm = math.sqrt(supervision_complexity(kernel, signs, adjusted=False).value)
    bound = margin_bound(torch.ones(8), float(kernel.trace()), norm, gamma=0.9)
    confidence = margin_bound(torch.ones(8), float(kernel.trace()), 0.0, gamma=0.9)
    assert bound - confidence == pytest.approx(2 / 0.9 * supervision_complexity(kernel, signs).value)


def test_the_margin_bound_holds_for_kernel_regression_on_fresh_examples():
    """Of linear functions on 2,000 examples, with a norm known beforehand: it is neither broken nor empty."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.nn.functional.normalize(torch.randn(22_000, 5, generator=draw), dim=1)
    direction = torch.nn.functional.normalize(torch.randn(5, generator=draw), dim=0)
    margins = (inputs @ direction) * torch.where(torch.rand(22_000, generator=draw) < 0.05, -1, 1) * 3
    margins = margins * (inputs @ direction).sign()
    wrong = float((margins[2_000:] <= 0).double().mean())
    assert wrong < margin_bound(margins[:2_000], trace=2_000, norm=3.0, gamma=0.6) < 0.8


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"margins": torch.ones(0)}, r"margins have shape \(0,\)"),
        ({"margins": torch.tensor([math.nan])}, "give finite numbers"),
        ({"trace": -1.0}, "trace is -1.0"),
        ({"norm": math.inf}, "norm is inf"),
        ({"gamma": 0.0}, "gamma is 0.0; a margin must be positive"),
        ({"delta": 1.0}, "delta is 1.0"),
    ],
)
def test_a_bound_without_sense_is_refused(changes, error):
    with pytest.raises(ValueError, match=error):
        margin_bound(**{"margins": torch.ones(3), "trace": 1.0, "norm": 1.0, "gamma": 0.5} | changes)


# ---- as a share of random targets' ----


@given(seeds, st.sampled_from([0.0, 1e-6, 1.0]))
def test_all_signs_cost_what_random_targets_do(seed, ridge):
    """Over all 2^n signs the mean of `y y^T` is the identity, so that the mean square of the share is 1."""
    kernel = random_kernel(5, seed)
    shares = [
        relative_complexity(kernel, torch.tensor(signs)[:, None], ridge)
        for signs in itertools.product([-1.0, 1.0], repeat=5)
    ]
    assert sum(share**2 for share in shares) / len(shares) == pytest.approx(1, rel=1e-6)


@given(seeds, st.floats(1e-6, 1e6))
def test_neither_the_scale_of_the_kernel_nor_that_of_the_targets_changes_the_share(seed, scale):
    kernel, targets = random_kernel(6, seed), random_targets(6, 3, seed=seed)
    share = relative_complexity(kernel, targets)
    assert relative_complexity(scale * kernel, targets) == pytest.approx(share, rel=1e-6)
    assert relative_complexity(kernel, scale * targets) == pytest.approx(share, rel=1e-6)


@given(seeds)
def test_eigenvectors_have_a_rising_share_and_all_of_them_together_are_random(seed):
    kernel = random_kernel(5, seed)
    values, vectors = torch.linalg.eigh(kernel)
    shares = [relative_complexity(kernel, vector[:, None], ridge=0.0) for vector in vectors.T.flip(0)]
    expected = (1 / values / (1 / values).mean()).sqrt().flip(0).tolist()
    assert shares == pytest.approx(expected, rel=1e-6) and shares == sorted(shares)
    assert relative_complexity(kernel, vectors, ridge=0.0) == pytest.approx(1)
    assert relative_complexity(kernel, torch.zeros(5, 2)) == 0
