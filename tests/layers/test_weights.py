"""Saved weights come back to the bit, whatever names and layout transformers saves them under, or not at all."""

import copy
import json
import os

import pytest
import torch
import transformers as hf
from architectures import _LLAMA, _VIT, ARCHITECTURES, VOCAB_SIZE, build
from conftest import assert_same_weights, tiny_bert, weights
from safetensors.torch import load_file, save_file
from transformers.conversion_mapping import get_model_conversion_mapping

from hf_curriculum_distill.layers.weights import load_weights

_EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 12}

# More families that are saved under other names, or in another layout, than they have in memory.
RENAMED = {
    "ast": (hf.ASTForAudioClassification, hf.ASTConfig(**_VIT, max_length=32, num_mel_bins=32)),
    "beit": (hf.BeitForImageClassification, hf.BeitConfig(**_VIT)),
    "dinov2-with-registers": (
        hf.Dinov2WithRegistersForImageClassification,
        hf.Dinov2WithRegistersConfig(**_VIT, num_register_tokens=2),
    ),
    "ijepa": (hf.IJepaForImageClassification, hf.IJepaConfig(**_VIT)),
    "qwen2-moe": (
        hf.Qwen2MoeForCausalLM,
        hf.Qwen2MoeConfig(**_LLAMA, **_EXPERTS, shared_expert_intermediate_size=12),
    ),
    "qwen3-moe": (hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig(**_LLAMA, **_EXPERTS)),
    "olmoe": (hf.OlmoeForCausalLM, hf.OlmoeConfig(**_LLAMA, **_EXPERTS)),
    "tied gpt-neox": (
        hf.GPTNeoXForCausalLM,
        hf.GPTNeoXConfig(vocab_size=VOCAB_SIZE, **{n: _VIT[n] for n in list(_VIT)[:4]}, tie_word_embeddings=True),
    ),
}


def make(name, seed):
    if name in ARCHITECTURES:
        return build(name, seed)[0]
    model_class, config = RENAMED[name]
    torch.manual_seed(seed)
    return model_class(copy.deepcopy(config))


@pytest.mark.parametrize("name", [*ARCHITECTURES, *RENAMED])
def test_every_family_gets_back_what_it_saved_in_the_parameters_it_had(name, tmp_path):
    saved, model = make(name, seed=1), make(name, seed=2)
    saved.save_pretrained(tmp_path)
    before = dict(model.named_parameters(remove_duplicate=False))
    load_weights(model, tmp_path)
    assert_same_weights(weights(model), weights(saved))
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys() and all(after[n] is before[n] for n in before)  # the optimizer knows these


def test_some_of_these_families_are_saved_under_other_names(tmp_path):
    """Otherwise nothing is tested here. Whether DINOv2 is one of them depends on the release of transformers."""
    of_all = get_model_conversion_mapping(make("bert", seed=1))
    for name in ("vit", "deit", "dinov2", "mixtral", "nomic-bert", "gpt-neox", *sorted({*RENAMED} - {"tied gpt-neox"})):
        model = make(name, seed=1)
        model.save_pretrained(tmp_path / name)
        converts = len(get_model_conversion_mapping(model)) > len(of_all)
        assert converts or name.startswith("dinov2"), name
        renamed = not load_file(tmp_path / name / "model.safetensors").keys() <= model.state_dict().keys()
        assert renamed == converts, name


@pytest.mark.parametrize("kind", ["shards", "pytorch_model.bin", "shards of .bin"])
@pytest.mark.parametrize("name", ["bert", "vit", "mixtral"])
def test_every_kind_of_file_that_trainer_reads_is_read(name, kind, tmp_path):
    saved, model = make(name, seed=1), make(name, seed=2)
    saved.save_pretrained(tmp_path, max_shard_size="20KB" if kind == "shards" else "1GB")
    if kind != "shards":
        tensors = load_file(tmp_path / "model.safetensors")
        os.remove(tmp_path / "model.safetensors")
        names = {key: f"pytorch_model-{index % 2}.bin" for index, key in enumerate(tensors)}
        if kind == "pytorch_model.bin":
            names = dict.fromkeys(tensors, kind)
        else:
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
        for file in set(names.values()):
            torch.save({key: value for key, value in tensors.items() if names[key] == file}, tmp_path / file)
    assert not (tmp_path / "model.safetensors").exists()
    load_weights(model, tmp_path)
    assert_same_weights(weights(model), weights(saved))


def test_a_model_keeps_its_precision_its_device_and_what_is_frozen(tmp_path):
    saved, model = make("vit", seed=1), make("vit", seed=2).bfloat16()
    model.classifier.weight.requires_grad_(False)
    saved.save_pretrained(tmp_path)
    load_weights(model, tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert_same_weights(weights(model), weights(saved.bfloat16()))
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["classifier.weight"]


class Headed(hf.BertForMaskedLM):
    """It cannot be made from its configuration alone, and has a head that its configuration does not know of."""

    def __init__(self, config, width):
        super().__init__(config)
        self.head = torch.nn.Linear(config.hidden_size, width)


def test_a_model_need_not_be_one_that_its_configuration_describes(tmp_path):
    torch.manual_seed(0)
    saved, model = (Headed(tiny_bert(2).config, width=3) for _ in range(2))
    saved.save_pretrained(tmp_path)
    load_weights(model, tmp_path)
    assert_same_weights(weights(model), weights(saved))


def test_a_model_that_was_itself_loaded_under_other_names_is_saved_and_loaded_under_these(tmp_path):
    original = tiny_bert(2, seed=1)
    tensors = {name.replace("bert.encoder", "backbone"): t for name, t in weights(original).items()}
    original.config.save_pretrained(tmp_path / "foreign")
    save_file({n: t for n, t in tensors.items() if "decoder" not in n}, tmp_path / "foreign" / "model.safetensors")
    model = hf.BertForMaskedLM.from_pretrained(tmp_path / "foreign", key_mapping={"^backbone": "bert.encoder"})
    model.save_pretrained(tmp_path / "saved")
    assert any(name.startswith("backbone") for name in load_file(tmp_path / "saved" / "model.safetensors"))
    expected = weights(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    load_weights(model, tmp_path / "saved")
    assert_same_weights(weights(model), expected)


def edited(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name, lost, named",
    [
        ("bert", "cls.predictions.transform.dense.bias", "cls.predictions.transform.dense.bias"),
        (
            "bert",
            "bert.embeddings.word_embeddings.weight",
            "bert.embeddings.word_embeddings.weight",
        ),  # and what is tied
        ("vit", "vit.encoder.layer.1.attention.attention.query.bias", "vit.layers.1.attention.q_proj.bias"),
        ("mixtral", "model.layers.2.block_sparse_moe.experts.1.w1.weight", "model.layers.2.mlp.experts.gate_up_proj"),
    ],
)
def test_a_weight_that_cannot_be_given_back_is_named_and_none_is_changed(name, lost, named, tmp_path):
    make(name, seed=1).save_pretrained(tmp_path)
    edited(tmp_path, lambda tensors: tensors.pop(lost))
    model = make(name, seed=2)
    before = weights(model)
    with pytest.raises(ValueError, match=named.replace(".", r"\.")):
        load_weights(model, tmp_path)
    assert_same_weights(weights(model), before)


def test_another_size_is_named_with_both(tmp_path):
    make("vit", seed=1).save_pretrained(tmp_path)
    edited(tmp_path, lambda tensors: tensors.update({"classifier.weight": torch.zeros(2, 32)}))
    with pytest.raises(ValueError, match=r"size mismatch for classifier\.weight: \(2, 32\) in the file, \(3, 32\) in"):
        load_weights(make("vit", seed=2), tmp_path)


def test_a_folder_without_weights_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        load_weights(tiny_bert(1), tmp_path)
