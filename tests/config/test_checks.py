"""Wrong values and combinations are refused by name."""

import math

import pytest

WRONG_VALUES = {
    "layer_stack": ["both", None],
    "method": ["progressive_", None, ""],
    "stages": [5, "kl", ["kl"], [{"kl_weigth": 1.0}], [{}], [{"kl_weight": -1.0}], '[{"kl_weight": 1.0'],
    "layer_map": ["first", 3, None, [[1]], [[1, 2], [1, 3]], [1, 2], '[[1, 2], "x"]'],
    "num_layer_stages": [0, -1, 1.5, True, "2"],
    "layer_order": ["random", None],
    "hidden_positions": ["all", None],
    "hidden_loss": ["l1", "hidden_mse", None],
    "pooling": ["max", "", True],
    "hidden_weight": [0, -0.1, math.inf, math.nan, "1", None],
    "hidden_weight_in_logit_stage": [-0.1, math.inf, math.nan, "1", None],
    "hidden_weight_at_end": [-0.1, math.inf, math.nan, "1", True, 0.0],
    "finished_layer_rate": [0, 0.0, -0.1, 1.1, math.nan, "1", None, True],
    "layer_stage_fraction": [0, 1, 0.0, 1.0, -0.5, 1.5, math.nan, True, "0.5"],
    "temperature": [0, 0.0, -1.0, math.inf, math.nan, "2", None, True],
    "divergence": ["kl", "forward", None],
    "label_loss_weight": [-1, math.nan, math.inf, "1"],
    "class_weights": [2.0, "balanced", "[1, 2", [], [0, 0.0], [1, -1], [1, math.nan], [True], ["1"]],
    "teacher_entropy_threshold": [-0.1, 1.1, math.nan, "0.5", True],
    "projection": ["learned", None],
    "calibration_samples": [0, -3, 2.5, "256", math.nan, math.inf],
    "logit_chunk_size": [-1, 2.5, "8", True, math.nan, math.inf],
    "train_prefix": ["all", None, "independent"],
    "stage_warmup_ratio": [-0.1, 1, 1.0, math.nan],
    "attn_implementation": ["", 3, True],
    "teacher_dtype": ["int8", "bf16", "auto"],
    "teacher_model_init_kwargs": [
        3,
        "revision",
        '{"a": 1',
        {1: 2},
        {"a": object()},
        {"token": "x"},
        {"torch_dtype": "x"},
    ],
    "teacher_schedule": ["steps", None, 3, [0], [1.0], [True], ["2"], "[1, 2"],
    "teacher_learning_rate": [0, -1.0, math.nan, math.inf, "1"],
    "teacher_cache": ["", 3, True],
    "teacher_cache_logits": [0, -1, 2.5, math.nan, math.inf, "8", True],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in WRONG_VALUES.items() for value in values])
def test_wrong_values_are_refused_by_name(config, name, value):
    with pytest.raises(ValueError, match=f"{name}|not a layer pair|name a student layer twice"):
        config(**{name: value})


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau"])
def test_a_schedule_with_a_memory_cannot_restart(config, schedule):
    fields = {"lr_scheduler_type": schedule, "eval_strategy": "steps", "eval_steps": 1}
    config(**fields)
    with pytest.raises(ValueError, match="restart_schedule_per_stage needs a schedule that is a function of the step"):
        config(restart_schedule_per_stage=True, **fields)


EXCLUDED = {
    "plateau": (
        {"finished_layer_rate": 0.5, "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"},
        "finished_layer_rate needs a schedule that is a function of the step",
    ),
    "frozen and slowed": (
        {"finished_layer_rate": 0.5, "train_prefix": "block"},
        r"finished_layer_rate is 0\.5, but train_prefix='block' freezes the finished layers; use train_prefix='joint'",
    ),
    "one after another and independent": (
        {"train_prefix": "independent", "layer_order": "cumulative"},
        "trains all segments at once, but layer_order is 'cumulative', .*; use layer_order='together'",
    ),
    "independent and measured": (
        {"train_prefix": "independent", "layer_order": "complexity"},
        "trains all segments at once, but layer_order is 'complexity', .*; use layer_order='together'",
    ),
    "an order of nothing": (
        {"layer_order": "complexity", "layer_stage_fraction": 0, "hidden_weight_in_logit_stage": 1.0},
        "layer_stage_fraction is 0, so that there are no layer stages for layer_order='complexity' to order; give them",
    ),
    "nothing to anneal": (
        {"hidden_weight_at_end": 0.0},
        "hidden_weight_at_end is 0, and so is hidden_weight_in_logit_stage, .*; set hidden_weight_in_logit_stage",
    ),
    "two dtypes": (
        {"teacher_dtype": "bfloat16", "teacher_model_init_kwargs": {"dtype": "float16"}},
        "teacher_dtype is 'bfloat16', but teacher_model_init_kwargs has 'dtype': 'float16'; give one of the two",
    ),
    "two attentions": (
        {"attn_implementation": "sdpa", "teacher_model_init_kwargs": {"attn_implementation": "eager"}},
        "attn_implementation is 'sdpa', but teacher_model_init_kwargs has 'attn_implementation': 'eager'",
    ),
    "a teacher that learns in bfloat16": (
        {"method": "online", "teacher_model_init_kwargs": {"dtype": "bfloat16"}},
        "has 'dtype': 'bfloat16', but method='online' trains the teacher, which needs 'float32'",
    ),
    "an encoder as embeddings": (
        {"freeze_embeddings_in_layer_stages": True, "layer_stack": "decoder"},
        "layer_stack='decoder', whose first block runs after the whole encoder, which would be frozen",
    ),
    "one rate": ({"finished_layer_rate": 0.5, "optim": "lomo"}, r"finished_layer_rate=0\.5 needs .* optim is 'lomo'"),
    "layerwise": ({"carry_optimizer": False, "optim": "galore_adamw_layerwise"}, "carry_optimizer=False needs an"),
    "elsewhere": ({"carry_optimizer": False, "optim": "schedule_free_adamw"}, "optim is 'schedule_free_adamw'; use"),
}


@pytest.mark.parametrize("name", EXCLUDED)
def test_what_excludes_each_other_is_refused(config, name):
    fields, message = EXCLUDED[name]
    with pytest.raises(ValueError, match=message):
        config(**fields)


@pytest.mark.parametrize("fields", [{"finished_layer_rate": 0.5}, {"carry_optimizer": False}], ids=str)
def test_deepspeeds_optimizer_is_out_of_reach(config, fields):
    with pytest.raises(ValueError, match="can't be had with deepspeed, whose optimizer is out of reach; launch with"):
        config(deepspeed={"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": "auto"}, **fields)


@pytest.mark.parametrize("temperature", [2, 0.5])
def test_hard_labels_have_no_temperature(config, temperature):
    assert config(divergence="hard").temperature == config(divergence="hard", temperature=1).temperature == 1
    with pytest.raises(ValueError, match=rf"temperature is {temperature} with divergence='hard', which has none"):
        config(divergence="hard", temperature=temperature)
