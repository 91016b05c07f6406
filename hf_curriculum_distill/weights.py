"""Load saved weights into an existing model."""

from __future__ import annotations

import copy
import json
import os
from collections import ChainMap

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig, load_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME


@torch.no_grad()
def load_weights(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Copy the weights that `save_pretrained` wrote into a model's parameters and buffers, all of them or none.

    Many families (ViT, Mixtral ...) are saved under other names, or in another layout, than they have in memory, and
    `load_state_dict` does not know that. The conversion that `from_pretrained` uses does.

    Args:
        model: of the class and configuration that was saved.
        folder: what `save_pretrained` wrote.

    Raises:
        FileNotFoundError: the folder has no weights.
        ValueError: a parameter or buffer of the model gets no value, or one of another shape.
    """
    tensors = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    # The conversion replaces parameters, but the optimizer knows these: so it converts into a copy without values.
    shell = copy.deepcopy(model, {id(tensor): torch.empty_like(tensor, device="meta") for tensor in tensors.values()})
    conversions = getattr(shell, "_weight_conversions", None)  # that `save_pretrained` reverses
    if conversions is None:
        conversions = get_model_conversion_mapping(shell)
    saved = _read_weights(os.fspath(folder))
    info, _ = convert_and_load_state_dict_in_model(shell, saved, LoadStateDictConfig(weight_mapping=conversions))

    if info.mismatched_keys:
        name, there, expected = min(info.mismatched_keys)
        raise ValueError(f"size mismatch for {name}: {tuple(there)} in the file, {tuple(expected)} in the model")
    found = {id(tensors[name]) for name in tensors.keys() - info.missing_keys}  # the file has only one of tied tensors
    unsaved = model._keys_to_ignore_on_save or ()  # constants that the model computes itself
    if lost := [n for n, t in tensors.items() if id(t) not in found and (t.requires_grad or n not in unsaved)]:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise ValueError(f"there is no value for {', '.join(lost[:3])}{more}")
    values = shell.state_dict()
    for name in tensors.keys() - info.missing_keys:
        tensors[name].copy_(values[name])


def _read_weights(folder: str) -> dict[str, Tensor]:
    for name, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if os.path.isfile(os.path.join(folder, name)):
            return load_state_dict(os.path.join(folder, name))
        if os.path.isfile(os.path.join(folder, index)):
            with open(os.path.join(folder, index), encoding="utf-8") as file:
                shards = sorted(set(json.load(file)["weight_map"].values()))
            return dict(ChainMap(*(load_state_dict(os.path.join(folder, shard)) for shard in shards)))
    raise FileNotFoundError(f"{folder} has no {SAFE_WEIGHTS_NAME}")
