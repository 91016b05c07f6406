"""Divergences by Liger-Kernel's Triton kernels against torch's, and a student whose forward Liger-Kernel replaced.

Needs liger-kernel, which comes with the `test` extra on Linux. Triton's interpreter runs the kernels on a CPU.
"""

import copy

import pytest
import torch
from conftest import masked_lm_examples
from hypothesis import given
from hypothesis import strategies as st
from layers.test_chunks import TERMS, assert_same_training
from test_trainer import train
from transformers import LlamaConfig, LlamaForCausalLM

from hf_curriculum_distill import losses

liger = pytest.importorskip("liger_kernel.transformers.functional", reason="liger-kernel is not installed")


@pytest.fixture
def kernel_calls(monkeypatch):
    """The direction of each divergence that a kernel computes from now on."""
    calls, liger_jsd = [], liger.liger_jsd

    def counted(student, teacher, beta):
        calls.append(beta)
        return liger_jsd(student, teacher, beta=beta)

    monkeypatch.setattr(liger, "liger_jsd", counted)
    return calls


@given(
    name=st.sampled_from(["forward_kl", "reverse_kl", "jensen_shannon"]),
    num_rows=st.integers(0, 5),
    num_classes=st.sampled_from([1, 2, 11, 64, 5000]),  # a kernel reads at most 4096 at a time
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    chunk_size=st.sampled_from([1, 128, losses._LOGITS_PER_CHUNK]),
    seed=st.integers(0, 999),
)
def test_a_kernel_has_the_sum_and_the_gradient_of_torch(
    name, num_rows, num_classes, temperature, scale, dtype, chunk_size, seed
):
    torch.manual_seed(seed)
    teacher = (scale * torch.randn(num_rows, num_classes)).to(dtype)
    student = (scale * torch.randn(num_rows, num_classes)).to(dtype).requires_grad_()
    expected = losses.DIVERGENCES[name](student, teacher, temperature)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "_LOGITS_PER_CHUNK", chunk_size)
        actual = losses.fused_divergence(name)(student, teacher, temperature)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    (wanted,), (gradient,) = (torch.autograd.grad(0.5 * total, [student]) for total in (expected, actual))
    rtol = 1e-4 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(gradient, wanted, rtol=rtol, atol=1e-5 * max(1.0, scale))


def test_hard_labels_have_no_kernel_and_are_computed_by_torch(config, student, teacher, examples, kernel_calls):
    assert losses.fused_divergence("hard") is losses.hard_label_loss
    runs = []
    for use_liger_kernel in (False, True):
        args = config(use_liger_kernel=use_liger_kernel, divergence="hard", stages=TERMS)
        runs.append(train(copy.deepcopy(student), copy.deepcopy(teacher), args, examples))
    assert not kernel_calls
    assert_same_training(*reversed(runs))


@pytest.mark.parametrize("size", [0, 3])
@pytest.mark.parametrize(
    "divergence, beta, fields",
    [
        ("forward_kl", 0.0, {"stages": TERMS}),
        ("reverse_kl", 1.0, {"stages": TERMS, "temperature": 2.0, "gradient_accumulation_steps": 2}),
        ("jensen_shannon", 0.5, {"method": "online", "label_loss_weight": 0.5}),
    ],
)
def test_training_with_kernels_is_the_same_training(
    config, student, teacher, examples, kernel_calls, size, divergence, beta, fields
):
    runs = []
    for use_liger_kernel in (False, True):
        assert not kernel_calls
        args = config(use_liger_kernel=use_liger_kernel, logit_chunk_size=size, divergence=divergence, **fields)
        runs.append(train(copy.deepcopy(student), copy.deepcopy(teacher), args, examples))
    assert set(kernel_calls) == {beta}
    assert_same_training(*reversed(runs))


def tiny_llama(depth):
    torch.manual_seed(depth)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": depth}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, pad_token_id=0))


@pytest.mark.parametrize(
    "fields",
    [{}, {"logit_chunk_size": 3}, {"freeze_matched_layers": True}, {"gradient_checkpointing": True}],
    ids=["whole", "chunks", "frozen", "checkpointing"],
)
def test_a_forward_that_liger_replaced_trains_and_evaluates_the_same(config, kernel_calls, fields):
    # of its patches those of one model, which leave the classes alone
    patches = {"rope": False, "rms_norm": False, "swiglu": False, "fused_linear_cross_entropy": True}
    data, runs = masked_lm_examples(16), []
    for use_liger_kernel in (False, True):
        args = config(
            use_liger_kernel=use_liger_kernel, liger_kernel_config=patches, stages=TERMS, max_steps=4, **fields
        )
        runs.append(train(tiny_llama(2), tiny_llama(4), args, data, eval_dataset=data[:6]))
    assert "liger" in runs[1].model.forward.__func__.__module__
    assert kernel_calls
    assert_same_training(*reversed(runs))
    for trainer in runs:
        trainer.train()  # again: patched, hooked and released a second time
    expected, actual = (trainer.evaluate() for trainer in runs)
    for name in ("eval_loss", "eval_accuracy", "eval_agreement", "eval_kl"):
        assert actual[name] == pytest.approx(expected[name], rel=1e-4), name
