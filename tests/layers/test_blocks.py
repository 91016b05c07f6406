"""The stack of blocks of each architecture against the modules with the name of its block."""

import copy

import pytest
import torch
import transformers as hf
from architectures import DEPTH, build
from transformers import BertConfig, BertModel

from hf_curriculum_distill.layers.blocks import backbone_config, describe_model, find_block_stack
from hf_curriculum_distill.layers.forward import PartialForward
from layers.test_forward import blocks_of, every_architecture


@every_architecture
def test_the_block_stack_is_every_block_in_order(name):
    model, block, _ = build(name)
    assert list(find_block_stack(model)) == blocks_of(model, block)
    assert PartialForward(model).depth == DEPTH


def _swin(depths):
    sizes = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "num_heads": [2] * len(depths), "window_size": 2}
    return hf.SwinForImageClassification(hf.SwinConfig(depths=depths, **sizes))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: _swin([1, 1, 3, 1]), "SwinForImageClassification change their shape between its stages"),
        (lambda: _swin([2, 2]), "change their shape between its stages"),
        (
            lambda: hf.ConvNextForImageClassification(hf.ConvNextConfig(hidden_sizes=[8] * 4, depths=[2, 2, 3, 2])),
            "change their shape between its stages",
        ),
        (
            lambda: hf.ResNetForImageClassification(
                hf.ResNetConfig(hidden_sizes=[8, 8], depths=[2, 2], embedding_size=8)
            ),
            "change their shape between its stages",
        ),
        (
            lambda: hf.FunnelForMaskedLM(
                hf.FunnelConfig(vocab_size=50, d_model=16, n_head=2, d_head=8, d_inner=16, block_sizes=[1, 1, 1])
            ),
            "exactly one ModuleList of num_hidden_layers=3 blocks .* but has: none",
        ),
        (
            lambda: hf.XLMWithLMHeadModel(hf.XLMConfig(vocab_size=50, emb_dim=16, n_layers=3, n_heads=2)),
            "but has: transformer.attentions, transformer.layer_norm1",
        ),
    ],
    ids=["swin", "swin-even", "convnext", "resnet", "funnel", "xlm"],
)
def test_models_without_a_stack_of_equal_blocks_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        find_block_stack(make())


def test_two_lists_of_the_same_length_are_refused():
    model = BertModel(BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4))
    model.second = copy.deepcopy(model.encoder.layer)
    with pytest.raises(ValueError, match=r"exactly one ModuleList of num_hidden_layers=2.*encoder.layer, second"):
        find_block_stack(model)


def test_only_encoder_decoders_have_a_decoder_stack():
    with pytest.raises(ValueError, match="layer_stack is 'decoder', but BertForMaskedLM is no encoder-decoder"):
        find_block_stack(build("bert")[0], "decoder")


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_a_block_that_runs_for_many_layers_is_repeated_in_the_stack_as_often_as_it_runs(groups):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 5}
    model = hf.AlbertForMaskedLM(hf.AlbertConfig(vocab_size=50, num_hidden_groups=groups, **sizes))
    ran, stack = [], find_block_stack(model)
    for block in dict.fromkeys(stack):
        block.register_forward_hook(lambda module, *_: ran.append(module))
    model(**model.dummy_inputs)
    assert stack == ran


@pytest.mark.parametrize("name, stacks", [("bert", 1), ("gpt2", 1), ("t5", 2), ("bart", 2), ("vit", 1), ("clip", 1)])
def test_the_configuration_of_a_stack_has_the_width_of_its_hidden_states(name, stacks):
    model, _, batch = build(name)
    for stack in ("encoder", "decoder")[:stacks]:
        hidden, _ = PartialForward(model, stack)(model, batch, [1])
        assert backbone_config(model, stack).hidden_size == hidden[1].shape[-1]
    if stacks == 1:
        with pytest.raises(ValueError, match="is no encoder-decoder"):
            backbone_config(model, "decoder")


def test_of_models_whose_hidden_states_change_their_shape_the_logits_alone_are_reached():
    config = hf.ResNetConfig(hidden_sizes=[8, 8], depths=[1, 1], embedding_size=8, num_channels=1, num_labels=3)
    model = hf.ResNetForImageClassification(config).eval()
    forward, inputs = PartialForward(model), {"pixel_values": torch.randn(2, 1, 16, 16)}
    assert (forward.blocks, forward.depth) == ([], 0)
    assert set(forward.parameters_before(0)) == set(model.parameters())
    plain = model(**inputs).logits
    _, logits = forward(model, inputs, logits=True)
    assert torch.equal(logits, plain)
    assert describe_model(model) == f"ResNetForImageClassification, {model.num_parameters():,} parameters"
