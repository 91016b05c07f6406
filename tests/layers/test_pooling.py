"""Pooling against one text at a time; padding, wherever it is and whatever it holds, changes nothing."""

import math

import pytest
import torch

from hf_curriculum_distill.layers.pooling import pooled


@pytest.mark.parametrize("kind", ["mean", "cls", "last"])
def test_each_example_is_pooled_without_its_padding(kind):
    torch.manual_seed(0)
    states, lengths = torch.randn(3, 5, 4), [5, 3, 1]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    by_hand = {"mean": lambda own: own.mean(0), "cls": lambda own: own[0], "last": lambda own: own[-1]}[kind]
    expected = torch.stack([by_hand(own[:length]) for own, length in zip(states, lengths, strict=True)])
    torch.testing.assert_close(pooled(kind, states, mask), expected)
    spoilt = states.masked_fill(~mask[..., None], math.nan).requires_grad_()
    result = pooled(kind, spoilt, mask)
    torch.testing.assert_close(result, expected)
    result.sum().backward()
    assert spoilt.grad.isfinite().all() and not spoilt.grad[~mask].any()


def test_weights_that_are_no_mask_are_shares():
    states = torch.tensor([[[0.0], [4.0]]])
    assert pooled("mean", states, torch.tensor([[0.25, 0.75]])).item() == 3.0


def test_padding_on_the_left_is_left_out():
    states, mask = torch.tensor([[[9.0], [1.0], [3.0]]]), torch.tensor([[0, 1, 1]])
    assert pooled("mean", states, mask).item() == 2.0
    assert pooled("last", states, mask).item() == 3.0


def test_half_precision_is_summed_in_float32():
    states = torch.full((1, 4096, 1), 0.1, dtype=torch.bfloat16)
    assert pooled("mean", states, torch.ones(1, 4096)).item() == pytest.approx(states[0, 0].item(), rel=1e-5)
