"""Matrices that are drawn depend on their seed and pair; those of a PCA are the directions that lose the least."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_curriculum_distill.projections.matrices import DRAWN, MEASURED, PROJECTIONS, make_matrix, principal_matrices
from hf_curriculum_distill.projections.moments import Moments

every_measured_kind = pytest.mark.parametrize("kind", MEASURED)
seeds = st.integers(0, 10**6)


def states_of(seed, count=60, dim=6, decay=0.6):
    """Vectors that vary more in some directions than in others, around a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    stretch = torch.randn(dim, dim, generator=generator).double() * decay ** torch.arange(dim)
    offset = torch.randn(dim, generator=generator).double()
    return torch.randn(count, dim, generator=generator).double() @ stretch.T + offset


def moments_of(states):
    moments = Moments()
    moments.add(states, products=True)
    return moments


def principal(states, kind="pca", rows=3, seed=0):
    return principal_matrices({2: moments_of(states)}, {(1, 2): (rows, states.shape[1])}, kind, seed, False)[1, 2]


def slow_covariance(states):
    rows, mean = states.numpy(), states.numpy().mean(0)
    return sum(np.outer(row - mean, row - mean) for row in rows) / len(rows)


def lost(states, matrix):
    """The variance that is left when states are replaced by their nearest points in the span of a matrix's rows."""
    basis = torch.linalg.qr(matrix.double().T).Q
    deviations = states - states.mean(0)
    return (deviations - deviations @ basis @ basis.T).square().sum(1).mean().item()


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_a_matrix_depends_on_its_seed_and_pair_unless_nothing_is_drawn(kind):
    made = make_matrix(kind, 3, 5, 0, (1, 2))
    assert made.shape == (3, 5) and made.dtype == torch.float32 and made.is_contiguous()
    assert torch.equal(made, make_matrix(kind, 3, 5, 0, (1, 2)))
    random = kind in DRAWN and kind != "identity"
    assert torch.equal(made, make_matrix(kind, 3, 5, 1, (1, 2))) != random
    assert torch.equal(made, make_matrix(kind, 3, 5, 0, (2, 2))) != random
    assert (kind in MEASURED) == (not made.any())


@given(seed=seeds, rows=st.integers(1, 6))
def test_the_rows_of_a_pca_are_the_first_eigenvectors_of_the_slow_covariance(seed, rows):
    states = states_of(seed)
    matrix = principal(states, rows=rows).double()
    variances, vectors = np.linalg.eigh(slow_covariance(states))
    variances, vectors = variances[::-1][:rows], vectors.T[::-1][:rows]
    covariance = torch.from_numpy(slow_covariance(states))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(rows).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        matrix @ covariance @ matrix.T, torch.from_numpy(np.diag(variances)), rtol=0, atol=1e-6 * variances[0]
    )
    gaps = -np.diff(np.sort(np.linalg.eigvalsh(slow_covariance(states)))[::-1])
    if gaps.min() > 1e-2 * variances[0]:  # otherwise a direction is known only up to rounding over a small gap
        np.testing.assert_allclose(np.abs((matrix.numpy() * vectors).sum(1)), 1, atol=1e-5)


@every_measured_kind
@given(seed=seeds, rows=st.integers(1, 5))
def test_of_all_subspaces_that_of_a_pca_loses_the_least_variance(kind, seed, rows):
    states = states_of(seed)
    least = np.sort(np.linalg.eigvalsh(slow_covariance(states)))[: 6 - rows].sum()
    assert lost(states, principal(states, kind, rows, seed)) == pytest.approx(least, rel=1e-5, abs=1e-9)
    for other in ("gaussian", "rademacher", "orthogonal", "identity"):
        matrix = make_matrix(other, rows, 6, seed, (1, 2)).double()
        if torch.linalg.matrix_rank(matrix) == rows:
            assert lost(states, matrix) >= least * (1 - 1e-9)


def test_a_rotation_keeps_the_subspace_and_makes_the_variances_about_equal():
    states = states_of(0, count=2000, dim=96, decay=0.95)
    plain, rotated = (principal(states, kind, rows=64).double() for kind in MEASURED)
    torch.testing.assert_close(rotated @ rotated.T, torch.eye(64).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(rotated.T @ rotated, plain.T @ plain, rtol=0, atol=1e-5)  # the same projection
    spreads = [((states - states.mean(0)) @ matrix.T).square().mean(0) for matrix in (plain, rotated)]
    ratios = [(spread.max() / spread.min()).item() for spread in spreads]
    assert ratios[0] > 100 and ratios[1] < 8
    assert spreads[0].sum().item() == pytest.approx(spreads[1].sum().item(), rel=1e-6)


@every_measured_kind
def test_a_seed_rotates_and_does_nothing_else(kind):
    states = states_of(3)
    first, second = (principal(states, kind, seed=seed) for seed in (0, 1))
    assert torch.equal(first, second) == (kind == "pca")
    torch.testing.assert_close(first.T @ first, second.T @ second, rtol=0, atol=1e-6)


@given(seed=seeds)
def test_the_largest_entry_of_a_direction_is_positive(seed):
    matrix = principal(states_of(seed), rows=6)
    largest = matrix.abs().argmax(1, keepdim=True)
    assert (matrix.gather(1, largest) > 0).all()


def test_of_equally_large_entries_the_first_is_positive():
    one = torch.randn(20, 1).double()
    for sign in (1, -1):
        matrix = principal(torch.cat([sign * one, -sign * one], 1), rows=1)
        torch.testing.assert_close(matrix, torch.tensor([[0.5**0.5, -(0.5**0.5)]]))


@given(seed=seeds, rank=st.integers(1, 4))
def test_rows_beyond_the_directions_in_which_states_vary_are_zero(seed, rank):
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(40, rank, generator=generator) @ torch.randn(rank, 6, generator=generator) + 10
    matrix = principal(flat.double(), rows=5)  # rounded to float32: the other directions hold that rounding
    assert matrix.any(1).tolist() == [index < rank for index in range(5)]


@every_measured_kind
def test_a_shared_matrix_is_that_of_the_pooled_covariance_of_its_layers(kind):
    layers = {layer: states_of(layer) + 5 * layer for layer in (2, 4)}
    moments = {layer: moments_of(states) for layer, states in layers.items()}
    shapes = {(1, 2): (3, 6), (2, 4): (3, 6), (3, 4): (3, 6), (4, 4): (2, 6)}
    shared = principal_matrices(moments, shapes, kind, 0, True)
    pooled = torch.cat([states - states.mean(0) for states in layers.values()])
    expected = principal_matrices({0: moments_of(pooled)}, {(0, 0): (3, 6)}, kind, 0, True)[0, 0]
    for pair in ((1, 2), (2, 4), (3, 4)):  # layer 4 counts once
        torch.testing.assert_close(shared[pair], expected, rtol=0, atol=1e-6)
        assert torch.equal(shared[pair], shared[1, 2])
    assert len({matrix.data_ptr() for matrix in shared.values()}) == 4
    alone = principal_matrices({4: moments[4]}, {(4, 4): (2, 6)}, kind, 0, True)[4, 4]
    assert torch.equal(shared[4, 4], alone)  # of its shape there is one layer
