"""The values of a model: read from files, checked, and recognised again."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections import ChainMap
from collections.abc import Collection

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig, load_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from hf_curriculum_distill.layers.adapted import stored_tensors


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


def check_one_device(model: PreTrainedModel, who: str, device: torch.device) -> None:
    """Raise a `ValueError` if a model was loaded onto several devices, or is read from a disk while it runs.

    Args:
        who: the model, as the message names it.
        device: of the process.
    """
    devices = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(devices) > 1 or "disk" in devices:
        raise ValueError(
            f"The {who}'s device_map spreads it over {', '.join(sorted(devices))}, but each process runs its {who} as "
            f"a whole, on {device}; load it onto one device, in a smaller dtype or quantised if it is too large."
        )


def check_finite_weights(model: nn.Module, who: str) -> None:
    """Raise a `ValueError` that names the first parameter with values that are nan, inf or missing.

    Args:
        who: the model, as the message names it.
    """
    named = [(name, tensor) for name, tensor in stored_tensors(model) if tensor.is_floating_point()]
    if missing := [name for name, tensor in named if tensor.is_meta]:
        raise ValueError(f"{missing[0]} of the {who} has no values yet (device 'meta'); load its weights first.")
    # a sum is finite only if all its terms are, and needs no second tensor of the same size
    finite = [tensor.sum(dtype=torch.float32).isfinite() for _, tensor in named]
    if finite and not torch.stack([flag.to(finite[0].device) for flag in finite]).all():  # waits once
        name = next(name for (name, _), flag in zip(named, finite, strict=True) if not flag)
        raise ValueError(
            f"{name} of the {who} has values that are nan or inf, and so would be its logits; take a sound "
            "checkpoint or, where a cast to float16 overflowed, another dtype."
        )


def weights_fingerprint(model: nn.Module, samples: int = 64, leave_out: Collection[str] = ()) -> str:
    """SHA-256 over evenly spaced values of every parameter: training changes it, moving to another device does not.

    Args:
        samples: about how many values of each parameter are hashed.
        leave_out: names of parameters that are not hashed.
    """
    digest = hashlib.sha256()
    stored = ((name, tensor) for name, tensor in stored_tensors(model) if name not in leave_out)
    for name, tensor in sorted(stored, key=lambda named: named[0]):
        flat = tensor.flatten()
        spaced = flat[:: max(1, flat.numel() // samples)].float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(spaced.numpy().tobytes())
    return digest.hexdigest()
