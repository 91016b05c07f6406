import re
from pathlib import Path

import pytest
import torch
from conftest import VOCAB_SIZE, tiny_bert
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from hf_curriculum_distill import CurriculumDistillationTrainer
from hf_curriculum_distill.planning import PlanArguments, PlannedConfig, make_plan

from .plans import LENGTH, examples_for, planned, saved


def renamed(tmp_path):
    """Weights under the names of ten years ago, which loading maps to those of today."""
    folder = Path(tmp_path, "teacher")
    tiny_bert(4).save_pretrained(folder)
    weights = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def deeper(folder):
    tiny_bert(5).save_pretrained(folder)
    tiny_bert(4).config.save_pretrained(folder)


def cut(folder):
    tiny_bert(4).save_pretrained(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def pickled(folder):
    tiny_bert(4).save_pretrained(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


WEIGHTS = {
    "whole": (lambda folder: tiny_bert(4).save_pretrained(folder), "ok", r"all that a BertForMaskedLM needs"),
    "in shards": (lambda folder: tiny_bert(4).save_pretrained(folder, max_shard_size="10KB"), "ok", r"all that"),
    "of old names": (lambda folder: renamed(folder.parent), "ok", r"all that"),
    "with another head, too": (
        lambda folder: BertForPreTraining(tiny_bert(4).config).save_pretrained(folder),
        "ok",
        r"all that",
    ),
    "without a head": (
        lambda folder: BertModel(tiny_bert(4).config).save_pretrained(folder),
        "error",
        r"has no weights for cls\.predictions\.bias, .* as a BertForMaskedLM these would be random",
    ),
    "with another head": (
        lambda folder: BertForSequenceClassification(tiny_bert(4).config).save_pretrained(folder),
        "error",
        r"has no weights for cls\.predictions\.bias",
    ),
    "of another size": (
        lambda folder: (tiny_bert(4).save_pretrained(folder), tiny_bert(4, width=32).config.save_pretrained(folder)),
        "error",
        r"has no weights for",
    ),
    "with more blocks": (deeper, "error", r"encoder\.layer\.4\..*, a block that its config.json leaves out"),
    "cut": (cut, "error", r"cannot be loaded"),
    "missing": (
        lambda folder: tiny_bert(4).config.save_pretrained(folder),
        "error",
        r"has a config.json, but no weights",
    ),
    "pickled": (pickled, "skip", r"no safetensors file .* not known; its configuration names BertForMaskedLM"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_teacher_that_the_run_cannot_load_is_refused_without_reading_its_weights(tmp_path, student, config, name):
    make, outcome, message = WEIGHTS[name]
    folder, student_folder = tmp_path / "teacher", tmp_path / "student"
    make(folder)
    student.config.save_pretrained(student_folder)
    options = PlanArguments(student=str(student_folder), teacher=str(folder), block_size=LENGTH)
    plan = make_plan(options, PlannedConfig(str(tmp_path / "out"), max_steps=8))
    (check,) = [check for check in plan.checks if check[1] == "teacher's weights"]
    assert check[0] == outcome and re.search(message, check[2]), check
    try:  # the run agrees
        CurriculumDistillationTrainer(student, config(), train_dataset=examples_for(student), teacher_model=str(folder))
    except (ValueError, OSError) as error:
        assert outcome == "error" and (name == "missing" or " ".join(str(error).split()) == check[2])
    else:
        assert outcome != "error"


def test_a_config_json_that_names_a_model_without_a_head_is_refused(tmp_path):
    for number, (architecture, outcome) in enumerate((("BertModel", "error"), ("BertForMaskedLM", "skip"))):
        config = tiny_bert(4).config
        config.architectures = [architecture]
        config.save_pretrained(tmp_path / f"{number}")
        path = str(tmp_path / f"{number}/config.json")
        plan = make_plan(PlanArguments(student=path, teacher=path, block_size=8), PlannedConfig("out", max_steps=8))
        (check,) = [check for check in plan.checks if check[1] == "teacher's weights"]
        assert check[0] == outcome and (outcome == "skip" or "BertModel, which has no head" in check[2])


TWICE = [{"hidden": [[1, 1]], "until": 2}, {"hidden": [[1, 2]], "until": 4}, {"kl_weight": 1.0}]

REFUSED = {
    "a layer twice": ({"stages": TWICE}, r"name a student layer twice"),
    "a cache for nobody": ({"stages": [{"label_weight": 1.0}], "teacher_cache": "cache"}, "no stage needs the teacher"),
    "a pca of a teacher that changes": (
        {
            "method": "online", "projection": "pca", "standardize_targets": False,
            "stages": [{"hidden": [[1, 2]], "until": 4}, {"kl_weight": 1.0}],
        },
        r"the teacher changes while it teaches; use a random projection",
    ),
    "a cache that keeps too little": (
        {"divergence": "reverse_kl", "teacher_cache": "cache", "teacher_cache_logits": 8},
        r"only 'forward_kl' and 'hard' can be computed from",
    ),
    "too few ends": (
        {"method": "progressive", "teacher_schedule": [0.5]}, r"teacher_schedule has 1 ends for 3 checkpoints"
    ),
    "ends beyond the steps": (
        {"method": "progressive", "teacher_schedule": [4, 9]}, r"each checkpoint must stop teaching after the one"
    ),
    "frozen embeddings alone": (
        {"stages": [{"hidden": [[0, 0]], "until": 2}, {"kl_weight": 1.0}], "freeze_embeddings_in_layer_stages": True},
        r"'layer 0' would train nothing: .* or are frozen by freeze_embeddings_in_layer_stages",
    ),
    "layerdrop": ({"layerdrop": 0.1}, r"The student's layerdrop is 0.1"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_plan_and_run_refuse_the_same(tmp_path, config, name):
    fields, message = REFUSED[name]
    model = {key: value for key, value in fields.items() if key == "layerdrop"}
    fields = {key: value for key, value in fields.items() if key not in model}
    if "teacher_cache" in fields:
        fields["teacher_cache"] = str(tmp_path / "cache")
    student = tiny_bert(2, **model)
    for step in (2, 4, 6):
        tiny_bert(4, seed=step).save_pretrained(tmp_path / f"teacher/checkpoint-{step}")
    teacher = str(tmp_path / "teacher") if fields.get("method") == "progressive" else f"{tmp_path}/teacher/checkpoint-6"
    options = PlanArguments(student=saved(tmp_path / "student", student), teacher=teacher, block_size=LENGTH)
    plan = make_plan(options, PlannedConfig(str(tmp_path / "out"), max_steps=8, **fields))
    assert re.search(message, "; ".join(plan.errors)) and not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match=message):
        CurriculumDistillationTrainer(
            student, config(**fields), train_dataset=examples_for(student), teacher_model=teacher
        )


def test_measured_matrices_and_other_losses_are_planned_as_any(tmp_path):
    student, teacher = tiny_bert(2), tiny_bert(4, width=24)
    fields = {"projection": "pca", "divergence": "hard", "hidden_loss": "cosine"}
    plain, other = (planned(tmp_path / f"{len(f)}", student, teacher, **f) for f in ({}, fields))
    assert not plain.errors and not other.errors
    assert other.total["flops"] == plain.total["flops"] > 0
    wider = planned(tmp_path / "wider", tiny_bert(2, width=32), teacher, projection="pca")
    assert "use a random projection, such as 'orthogonal'" in "; ".join(wider.errors)


SMALL = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("model", "longest"),
    [
        (BertForMaskedLM(BertConfig(**SMALL)), 32),
        (RobertaForMaskedLM(RobertaConfig(**SMALL, pad_token_id=1)), 30),
        (OPTForCausalLM(OPTConfig(**SMALL, word_embed_proj_dim=16, ffn_dim=32)), 32),
        (LlamaForCausalLM(LlamaConfig(**SMALL)), None),
    ],
    ids=["BERT", "RoBERTa", "OPT", "Llama"],
)
def test_an_example_has_no_more_tokens_than_the_model_has_positions(tmp_path, model, longest):
    length = longest or 64
    model.eval()(input_ids=torch.full((1, length), 5))
    path = saved(tmp_path / "model", model)
    task = "MaskedLM" if "MaskedLM" in type(model).__name__ else "CausalLM"
    fields = {"max_steps": 8, "per_device_train_batch_size": 2}
    fits, not_ = (
        make_plan(PlanArguments(path, path, task=task, block_size=size), PlannedConfig("out", **fields))
        for size in (length, length + 1)
    )
    assert not fits.errors
    assert bool(not_.errors) == (longest is not None)
    if longest:
        assert not_.errors == [f"batch: block_size is {longest + 1}, but the student reads at most {longest} tokens."]
        with pytest.raises((RuntimeError, IndexError)):
            model(input_ids=torch.full((1, length + 1), 5))
