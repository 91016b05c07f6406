"""Every knob: its other values are taken."""

import copy
import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPTQConfig, HfArgumentParser, TrainingArguments

from hf_curriculum_distill import CURRICULUM_EXTRACTION, CurriculumDistillationConfig, Stage

OTHER_VALUES = {
    "layer_stack": ["decoder"],
    "logging_nan_inf_filter": [True],
    "method": ["one_shot", "progressive", "online", "labels"],
    "stages": [[{"hidden": [[1, 2]], "until": 0.5}, {"kl_weight": 1.0}]],
    "layer_map": ["last", [[1, 2], [2, 4]]],
    "num_layer_stages": [1, 2],
    "layer_order": ["sequential", "cumulative", "last", "complexity"],
    "hidden_weight": [0.5, 2, 20.0],
    "hidden_positions": ["labels"],
    "hidden_weight_in_logit_stage": [0.0, 0.5, 20.0],
    "hidden_weight_at_end": [0.5, 2],
    "layer_stage_fraction": [0.01, 0.99],
    "temperature": [0.5, 2, 4.0],
    "divergence": ["reverse_kl", "jensen_shannon", "hard"],
    "hidden_loss": ["cosine", "layer_norm_mse"],
    "pooling": ["mean", "cls", "last", "pooler"],
    "label_loss_weight": [0.5, 1],
    "class_weights": [[1.0, 0.0, 2], [3]],
    "teacher_entropy_threshold": [0, 0.5, 1.0],
    "projection": ["rademacher", "orthogonal", "identity", "pca", "rotated_pca"],
    "projection_seed": [1, 2**40],
    "shared_projection": [False],
    "standardize_targets": [False],
    "calibration_samples": [1, 10_000],
    "logit_chunk_size": [0, 1, 512],
    "train_prefix": ["block"],
    "finished_layer_rate": [0.1, 0.999],
    "freeze_embeddings_in_layer_stages": [True],
    "freeze_matched_layers": [True],
    "truncate": [False],
    "restart_schedule_per_stage": [True],
    "stage_warmup_ratio": [0.0, 0.99],
    "carry_optimizer": [False],
    "attn_implementation": ["eager", "flash_attention_2", "kernels-community/flash-attn"],
    "teacher_dtype": ["float32", "bfloat16", "float16"],
    "teacher_model_init_kwargs": [{"revision": "v1", "dtype": "auto"}, {"device_map": {"": 0}}, {}],
    "teacher_schedule": ["fraction", [3, 7], [0.25, 0.5], []],
    "teacher_learning_rate": [1e-3, 1],
    "teacher_cache": ["cache", "/tmp/a folder"],
    "evaluate_layers": [True],
    "teacher_cache_logits": [1, 10_000, None],
}


def own_fields():
    stock = {f.name: f.default for f in dataclasses.fields(TrainingArguments)}
    fields = dataclasses.fields(CurriculumDistillationConfig)
    return {f.name: f for f in fields if f.name not in stock or stock[f.name] != f.default}


def test_every_field_of_ours_is_tried_and_says_what_it_does():
    assert own_fields().keys() == OTHER_VALUES.keys()
    assert all(field.metadata["help"] for field in own_fields().values())


@pytest.mark.parametrize("name, value", [(name, value) for name, values in OTHER_VALUES.items() for value in values])
def test_other_values_are_taken(config, name, value):
    given = copy.deepcopy(value)
    made = getattr(config(**{name: value}), name)
    assert value == given
    assert made != own_fields()[name].default
    if name != "stages":
        assert made == given


def test_the_two_other_defaults(config):
    assert config().ddp_find_unused_parameters is True
    assert config(ddp_find_unused_parameters=False).ddp_find_unused_parameters is False
    assert config().logging_nan_inf_filter is False


@pytest.mark.parametrize(
    "stages, message",
    [
        ([{"kl_weight": 1.0}, {"kl_weigth": 1.0, "a": 1}], r"stages\[1\] has unknown fields \['a', 'kl_weigth'\]"),
        ([{"kl_weight": 1.0, "until": 2.0}], r"stages\[0\]: Stage.until is 2.0"),
        ([{"kl_weight": 1.0}, 3], r"stages\[1\] is 3; write each stage as a dict"),
    ],
)
def test_a_wrong_stage_is_named_by_its_number(config, stages, message):
    with pytest.raises(ValueError, match=message):
        config(stages=stages)


def test_stages_are_the_same_as_objects_dicts_and_json(config):
    dicts = [{"hidden": [[1, 2], [2, 4]], "until": 0.5}, {"kl_weight": 1.0, "label_weight": 0.5}]
    objects = [Stage(hidden=((1, 2), (2, 4)), until=0.5), Stage(kl_weight=1.0, label_weight=0.5)]
    made = [config(stages=stages).stages for stages in (dicts, objects, json.dumps(dicts))]
    assert made[0] == made[1] == made[2]
    assert [Stage(**stage) for stage in made[0]] == objects


def test_arguments_of_the_teachers_loading_are_the_same_as_objects_and_as_json(config):
    plain = {"dtype": "bfloat16", "quantization_config": GPTQConfig(bits=4).to_dict()}
    objects = {"dtype": torch.bfloat16, "quantization_config": GPTQConfig(bits=4)}
    for kwargs in (plain, objects, json.dumps(plain)):
        assert config(teacher_model_init_kwargs=kwargs).teacher_model_init_kwargs == plain
    read = HfArgumentParser(CurriculumDistillationConfig).parse_args_into_dataclasses(
        ["--output_dir", "out", "--use_cpu", "--teacher_model_init_kwargs", json.dumps(plain)]
    )
    assert read[0].teacher_model_init_kwargs == plain


@given(st.sampled_from(sorted(OTHER_VALUES)), st.data())
def test_a_config_survives_its_own_json(name, data):
    value = data.draw(st.sampled_from(OTHER_VALUES[name]))
    made = CurriculumDistillationConfig("out", use_cpu=True, report_to="none", **{name: copy.deepcopy(value)})
    read = json.loads(made.to_json_string())
    again = CurriculumDistillationConfig("out", use_cpu=True, report_to="none", **{name: read[name]})
    assert getattr(again, name) == getattr(made, name)


def test_the_command_line_sets_every_kind_of_field(tmp_path):
    stages = [{"hidden": [[1, 2]], "until": 4}, {"kl_weight": 1.0}]
    command = ["--output_dir", str(tmp_path), "--use_cpu", "--temperature", "2.0", "--num_layer_stages", "3"]
    command += ["--stages", json.dumps(stages), "--layer_map", "[[1, 2]]", "--truncate", "False"]
    (args,) = HfArgumentParser(CurriculumDistillationConfig).parse_args_into_dataclasses(command)
    assert (args.temperature, args.num_layer_stages, args.truncate) == (2.0, 3, False)
    assert [Stage(**stage) for stage in args.stages] == [Stage(**stage) for stage in stages]
    assert args.layer_map == [[1, 2]]


# ---- what the fields stand for ----


@pytest.mark.parametrize(
    "fields, names",
    [
        ({}, ["layer 1", "layer 2", "layer 3", "kl"]),
        ({"method": "one_shot", "label_loss_weight": 0.5}, ["kl + labels"]),
        ({"num_layer_stages": 1}, ["layer 3", "kl"]),
        ({"layer_map": "last", "num_layer_stages": 2}, ["layer 2", "layer 3", "kl"]),
        ({"layer_map": [[1, 1], [3, 5]], "layer_order": "cumulative"}, ["layer 1", "layers 1, 3", "kl"]),
        ({"layer_order": "together", "hidden_weight_in_logit_stage": 1.0}, ["layers 1-3", "kl + layers 1-3"]),
        ({"layer_stage_fraction": 0, "hidden_weight_in_logit_stage": 1.0}, ["kl + layer 3"]),
        ({"layer_stage_fraction": 0, "layer_order": "together", "hidden_weight_at_end": 0.5}, ["kl + layers 1-3"]),
        ({"stages": [{"label_weight": 1.0}], "method": "one_shot"}, ["labels"]),
    ],
)
def test_fields_resolve_to_stages(config, fields, names):
    assert [stage.name for stage in config(**fields).resolve_stages(3, 6)] == names


def test_by_default_all_layers_are_matched_to_the_end_and_the_papers_order_is_a_preset():
    default, paper = (
        CurriculumDistillationConfig("out", use_cpu=True, report_to="none", **preset).resolve_stages(3, 6)
        for preset in ({}, CURRICULUM_EXTRACTION)
    )
    assert [(stage.name, stage.hidden, stage.hidden_weight) for stage in default] == [
        ("layers 1-3", ((1, 2), (2, 4), (3, 6)), 1.0),
        ("kl + layers 1-3", ((1, 2), (2, 4), (3, 6)), 1.0),
    ]
    assert [stage.name for stage in paper] == ["layer 1", "layer 2", "layer 3", "kl"]
    assert paper[-1].hidden == () and {stage.hidden_weight for stage in paper[:-1]} == {1.0}


def test_without_a_teacher_there_is_nothing_to_match(config):
    assert config().resolve_stages(3, None) == ()
    assert [stage.name for stage in config(stages=[{"label_weight": 1.0}]).resolve_stages(3, None)] == ["labels"]
    with pytest.raises(ValueError, match=r"stages\[0\] \(kl\) matches a teacher, but no teacher_model was given"):
        config(stages=[{"kl_weight": 1.0}]).resolve_stages(3, None)


def test_the_hidden_term_is_annealed_in_the_logit_stage_alone(config):
    fields = {"layer_order": "together", "hidden_weight_in_logit_stage": 0.5, "hidden_weight_at_end": 0.0}
    layers, logits = config(**fields).resolve_stages(2, 4)
    assert (layers.hidden_weight, layers.hidden_weight_at_end) == (1.0, None)
    assert (logits.hidden, logits.hidden_weight, logits.hidden_weight_at_end) == (layers.hidden, 0.5, 0.0)


def test_segments_are_independent_where_they_are_matched_together_or_in_stages_of_ones_own(config):
    assert config(train_prefix="independent", layer_order="together").train_prefix == "independent"
    stages = [{"hidden": [[1, 2], [2, 4]], "until": 0.5}, {"kl_weight": 1.0}]
    assert config(train_prefix="independent", stages=stages).layer_order == "sequential"
