"""A model's stack of transformer blocks, and the configuration that describes it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def find_block_stack(model: nn.Module, stack: str = "encoder") -> list[nn.Module]:
    """The transformer blocks whose outputs are a model's hidden states, in the order in which they run.

    The stack is the `ModuleList` whose length is the configuration's number of layers; if several have that length, the
    one whose blocks support gradient checkpointing and are in no feature extractor or decoder. ALBERT runs each of its
    few blocks for many layers: the list repeats it.

    Args:
        stack: "encoder" or "decoder", for an encoder-decoder.

    Raises:
        ValueError: no list or several lists fit, or the shape of hidden states changes between layers.
    """
    config = backbone_config(model, stack)
    decodes = stack == "decoder" or getattr(config, "is_decoder", False)  # one configuration may describe both stacks
    depth = getattr(config, "decoder_layers" if decodes else "", None) or getattr(config, "num_hidden_layers", None)
    lists = [(n, m) for n, m in _backbone(model, stack).named_modules() if isinstance(m, nn.ModuleList)]
    if getattr(config, "num_hidden_groups", None):
        groups = next(m for name, m in lists if name.endswith("albert_layer_groups"))
        return [groups[layer * len(groups) // depth] for layer in range(depth)]
    if changes_shape(model, stack):
        raise ValueError(
            f"The hidden states of {type(model).__name__} change their shape between its stages (depths="
            f"{config.depths}), so that layers can't be matched; use a model whose blocks are all of one width."
        )
    lists = [(n, m) for n, m in lists if len(m) == depth and not any(isinstance(b, nn.ModuleList) for b in m)]
    blocks = [(n, m) for n, m in lists if all(isinstance(block, GradientCheckpointingLayer) for block in m)]
    found = blocks or lists
    if len(found) > 1:  # the convolutions of an audio model may be as many, or the decoder's blocks of an autoencoder
        found = [(n, m) for n, m in found if not any(part in n for part in ("feature_extractor", "decoder"))]
    if len(found) != 1 or not depth:
        seen = ", ".join(name for name, _ in found) or "none"
        raise ValueError(
            f"{type(model).__name__} needs exactly one ModuleList of num_hidden_layers={depth} blocks to be matched "
            f"layer by layer, but has: {seen}. Models that are built otherwise are not supported."
        )
    return list(found[0][1])


def changes_shape(model: nn.Module, stack: str = "encoder") -> bool:
    """Whether a model's hidden states change their shape between its stages, as those of ResNet and Swin do, so that it
    has no stack of blocks to be matched; its logits can be."""
    return getattr(backbone_config(model, stack), "depths", None) is not None


def _backbone(model: nn.Module, stack: str = "encoder") -> nn.Module:
    if getattr(model.config, "is_encoder_decoder", False):
        return model.get_decoder() if stack == "decoder" else model.get_encoder()
    if stack == "decoder":
        raise ValueError(
            f"layer_stack is 'decoder', but {type(model).__name__} is no encoder-decoder and has one stack of blocks; "
            "leave layer_stack out."
        )
    return model


def backbone_config(model: nn.Module, stack: str = "encoder") -> Any:
    """The configuration of a stack, or of the part of a multimodal model that reads its main input."""
    backbone = _backbone(model, stack)
    config = getattr(backbone, "config", model.config)
    if getattr(model, "main_input_name", None) == "pixel_values":  # CLIP also has a text model
        return getattr(config, "vision_config", config)
    return config.get_text_config()


def describe_model(model: PreTrainedModel, stack: str = "encoder") -> str:
    """A model in a few words: its class, its blocks, its width and its size."""
    if changes_shape(model, stack):
        return f"{type(model).__name__}, {model.num_parameters():,} parameters"
    depth, width = len(find_block_stack(model, stack)), backbone_config(model, stack).hidden_size
    return f"{type(model).__name__}, {depth} blocks, hidden size {width}, {model.num_parameters():,} parameters"
