"""Models that other libraries have changed: wrapped by PEFT, or with quantised weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# kinds of adapters with which a model's layers or losses are not its own
_UNFIT = {
    "ADALORA": "adds a term to the model's own loss that no stage has",
    "ADAPTION_PROMPT": "calls the model's forward past every wrapper, so that it runs to its end in every stage",
}


def transformers_model(model: Any) -> Any:
    """The transformers model inside a PEFT model, adapters included; any other model is returned as it is.

    Code that looks at a model's class, forward or configuration needs this model, not PEFT's wrapper.

    Raises:
        ValueError: the adapters change the hidden states or the loss, or PEFT cannot save them for a resume.
    """
    if isinstance(model, PreTrainedModel) or not hasattr(model, "peft_config"):
        return model
    if not hasattr(model, "get_base_model"):
        raise ValueError(
            f"PEFT does not save a {type(model).__name__}, so no checkpoint could be resumed; use a PeftModel."
        )
    for config in model.peft_config.values():
        kind = getattr(config.peft_type, "value", config.peft_type)
        why = _UNFIT.get(kind)
        if config.is_prompt_learning:
            why = "puts a prompt before the input, so that hidden states or attention are not of the tokens alone"
        if why is not None:
            raise ValueError(f"The {type(model).__name__}'s adapter {kind} {why}; use one inside of layers, like LoRA.")
    return model.get_base_model()


def is_quantised(model: nn.Module) -> bool:
    """Whether transformers loaded the model with quantised weights."""
    return getattr(model, "hf_quantizer", None) is not None


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters, with their names and without gradients.

    Of packed parameters, these are the tensors that they consist of; of quantised models, also the buffers.
    """
    named = [*model.named_parameters(), *(model.named_buffers() if is_quantised(model) else ())]
    for name, tensor in named:
        if hasattr(tensor, "__tensor_flatten__"):
            yield from ((f"{name}.{part}", getattr(tensor, part)) for part in tensor.__tensor_flatten__()[0])
        elif hasattr(tensor, "quant_state"):
            # bitsandbytes in 4 bits reorders weights at their first use on some CPUs: take how often each code occurs
            codes = tensor.detach().flatten().view(torch.uint8)
            yield name, torch.bincount(codes & 15, minlength=16) + torch.bincount(codes >> 4, minlength=16)
        else:
            yield name, tensor.detach()
