"""Models that PEFT wraps or a library quantises: the model inside, and every tensor of its weights."""

import pytest
import torch
from conftest import tiny_bert
from torch import nn

from hf_curriculum_distill.layers.adapted import is_quantised, stored_tensors, transformers_model

peft = pytest.importorskip("peft", reason="peft is not installed")

LORA = {"target_modules": ["query", "value"]}
FIT = {
    "LoRA": lambda: peft.LoraConfig(**LORA),
    "DoRA": lambda: peft.LoraConfig(use_dora=True, **LORA),
    "IA3": lambda: peft.IA3Config(feedforward_modules=[], **LORA),
    "OFT": lambda: peft.OFTConfig(oft_block_size=4, **LORA),
}
SIZES = {"num_layers": 2, "token_dim": 16, "num_attention_heads": 2, "task_type": "SEQ_CLS"}
UNFIT = {
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **SIZES),
    "P_TUNING": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, **SIZES),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **SIZES),
    "ADALORA": lambda: peft.AdaLoraConfig(total_step=8, **LORA),
}


@pytest.mark.parametrize("model", [tiny_bert(1), nn.Linear(2, 2), None], ids=["transformers", "torch", "none"])
def test_what_peft_did_not_wrap_is_itself(model):
    assert transformers_model(model) is model


@pytest.mark.parametrize("kind", FIT)
def test_the_model_inside_of_adapters_is_the_one_that_was_wrapped(kind):
    model = tiny_bert(2)
    wrapped = peft.get_peft_model(model, FIT[kind]())
    assert transformers_model(wrapped) is model
    assert transformers_model(model) is model
    own = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in wrapped.parameters() if parameter.requires_grad} <= own  # adapters included


@pytest.mark.parametrize("kind", UNFIT)
def test_adapters_that_change_the_hidden_states_or_the_loss_are_refused(kind):
    wrapped = peft.get_peft_model(tiny_bert(2), UNFIT[kind]())
    with pytest.raises(ValueError, match=f"The PeftModel.*'s adapter {kind} .*; use one inside of layers, like LoRA"):
        transformers_model(wrapped)


def test_several_adapters_are_as_fit_as_one():
    wrapped = peft.get_peft_model(model := tiny_bert(2), FIT["LoRA"]())
    wrapped.add_adapter("second", FIT["LoRA"]())
    assert transformers_model(wrapped) is model


def test_a_model_of_mixed_adapters_is_refused():
    mixed = peft.get_peft_model(tiny_bert(2), FIT["LoRA"](), mixed=True)
    with pytest.raises(ValueError, match="PEFT does not save a PeftMixedModel"):
        transformers_model(mixed)


# ---- stored tensors ----


def test_every_parameter_is_stored_once_by_its_name_without_gradients():
    model = tiny_bert(2)
    assert model.cls.predictions.decoder.weight is model.get_input_embeddings().weight  # shared, so named once
    stored = list(stored_tensors(model))
    assert [name for name, _ in stored] == [name for name, _ in model.named_parameters()]
    for (_, tensor), parameter in zip(stored, model.parameters(), strict=True):
        assert tensor.data_ptr() == parameter.data_ptr()
        assert not tensor.requires_grad
    assert not is_quantised(model)


def test_of_packed_parameters_the_parts_are_stored_whatever_the_class():
    class Pair(torch.Tensor):
        """Two halves that look like one tensor, as torchao packs integers and scales."""

        @staticmethod
        def __new__(cls, first, second):
            return torch.Tensor._make_wrapper_subclass(cls, (2, *first.shape), dtype=first.dtype)

        def __init__(self, first, second):
            self.first, self.second = first, second

        def __tensor_flatten__(self):
            return ["first", "second"], None

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            return cls(*(function(part) for part in (args[0].first, args[0].second)))

    model, parts = nn.Linear(3, 2), (torch.rand(3), torch.rand(3))
    model.weight = nn.Parameter(Pair(*parts), requires_grad=False)
    stored = dict(stored_tensors(model))
    assert list(stored) == ["weight.first", "weight.second", "bias"]
    assert torch.equal(stored["weight.first"], parts[0]) and torch.equal(stored["weight.second"], parts[1])


def test_buffers_are_stored_iff_the_model_is_quantised():
    model = tiny_bert(2)
    parameters, buffers = ({name for name, _ in named} for named in (model.named_parameters(), model.named_buffers()))
    assert buffers
    assert {name for name, _ in stored_tensors(model)} == parameters
    model.hf_quantizer = object()  # as transformers marks quantised models
    assert is_quantised(model)
    assert {name for name, _ in stored_tensors(model)} == parameters | buffers


def test_of_four_bit_weights_every_code_is_counted_in_whatever_order():
    layer = nn.Linear(4, 2, bias=False)
    layer.weight = nn.Parameter(torch.randint(0, 256, (40, 1), dtype=torch.uint8), requires_grad=False)
    layer.weight.quant_state = object()  # as bitsandbytes marks two codes a byte
    ((name, counts),) = stored_tensors(layer)
    codes = [code for byte in layer.weight.flatten().tolist() for code in divmod(byte, 16)]
    assert name == "weight"
    assert counts.tolist() == [codes.count(code) for code in range(16)]
    layer.weight.data = layer.weight.data[torch.randperm(40)]
    assert torch.equal(dict(stored_tensors(layer))["weight"], counts)
