"""Moments of vectors that come batch by batch are those of all vectors at once."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_curriculum_distill.projections.moments import Moments, measure


def slow(vectors):
    """Mean and sums of products of deviations, in loops."""
    count, dim = vectors.shape
    rows = vectors.tolist()
    mean = [sum(row[i] for row in rows) / count for i in range(dim)]
    products = [[sum((r[i] - mean[i]) * (r[j] - mean[j]) for r in rows) for j in range(dim)] for i in range(dim)]
    return torch.tensor(mean, dtype=torch.float64), torch.tensor(products, dtype=torch.float64)


@pytest.mark.parametrize("products", [True, False])
@given(
    seed=st.integers(0, 1000),
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    dim=st.integers(1, 4),
    offset=st.sampled_from([0.0, 1e4]),
)
def test_moments_are_the_slow_ones_however_the_vectors_are_cut(products, seed, sizes, dim, offset):
    vectors = torch.randn(sum(sizes), dim, generator=torch.Generator().manual_seed(seed)).double() + offset
    moments = Moments()
    for part in vectors.split(sizes):
        moments.add(part, products)
    assert moments.count == len(vectors)
    if not len(vectors):
        assert moments == Moments()
        return
    mean, scatter = slow(vectors)
    torch.testing.assert_close(moments.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments.scatter, scatter if products else scatter.diagonal(), rtol=1e-9, atol=1e-6)


@given(seed=st.integers(0, 1000), rows=st.integers(1, 5))
def test_projected_moments_are_the_moments_of_the_projected_vectors(seed, rows):
    generator = torch.Generator().manual_seed(seed)
    vectors, weight = (torch.randn(n, 3, generator=generator).double() for n in (7, rows))
    whole, own = Moments(), Moments()
    whole.add(vectors, products=True)
    own.add(vectors @ weight.T)
    projected = whole.projected(weight)
    assert projected.count == own.count
    torch.testing.assert_close(projected.mean, own.mean)
    torch.testing.assert_close(projected.std, own.std)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e3])
def test_a_coordinate_varies_unless_its_deviations_are_rounding(value):
    vectors = torch.full((9, 3), value)
    vectors[:, 1] += 1e-7 * torch.randn(9) * abs(value)
    vectors[:, 2] += torch.randn(9) * max(1e-4, abs(value))
    moments = Moments()
    moments.add(vectors.double())
    assert moments.varies.tolist() == [False, False, True]


# ---- a teacher's states ----


def teacher(batch, layers):
    assert layers == [2, 4]
    return {layer: batch[0] * layer for layer in layers}, batch[1]


def test_the_states_that_count_are_measured_at_every_layer_under_the_names_that_are_asked_for():
    states, mask = torch.randn(2, 3, 5, 4), torch.rand(2, 3, 5) < 0.6
    found = measure(teacher, zip(states, mask, strict=True), {"a": 4, "b": 2, "c": 2}, lambda n, s: s[:, : len(n)])
    for name, layer in (("a", 4), ("b", 2), ("c", 2)):
        expected = layer * states[mask][:, :1].double()
        assert found[name].count == len(expected)
        torch.testing.assert_close(found[name].mean, expected.mean(0), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(found[name].std, expected.std(0, correction=0), rtol=1e-6, atol=1e-7)
    assert found["a"].mean.dtype == torch.float64


def test_a_sample_without_positions_and_states_that_are_not_finite_are_refused():
    states, mask = torch.randn(3, 5, 4), torch.ones(3, 5)
    with pytest.raises(ValueError, match="calibration sample has no position that counts"):
        measure(teacher, [(states, 0 * mask)], {2: 2, 4: 4})
    states[1, 2, 3] = math.nan
    with pytest.raises(FloatingPointError, match="hidden states at layer 2 are not finite"):
        measure(teacher, [(states, mask)], {2: 2, 4: 4}, products=True)
    mask[1, 2] = 0
    measure(teacher, [(states, mask)], {2: 2, 4: 4}, products=True)
