import dataclasses
import runpy
from pathlib import Path

import pytest

from hf_curriculum_distill.cli import find_recipes, main
from hf_curriculum_distill.parsing import parse_arguments, read_yaml
from hf_curriculum_distill.planning import PlanArguments, PlannedConfig, recipe_defaults, unread_options

ROOT = Path(__file__).parents[2]
RECIPES = find_recipes()
PLANNED = {field.name for kind in (PlanArguments, PlannedConfig) for field in dataclasses.fields(kind)}
BY_SIZE = ["--student", "bert-2-64", "--teacher", "bert-4-128", "--output_dir", "out"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_not_read_is_an_option_of_a_recipe(recipe):
    options = {}
    for path in (ROOT / "recipes/configs" / recipe).glob("*.yaml"):
        options |= read_yaml(path)
    assert options.pop("recipe") == recipe
    unread = unread_options([RECIPES[recipe]], options)
    assert set(unread) == {name for name in options if name not in PLANNED}
    assert not {"max_steps", "learning_rate", "method", "teacher", "per_device_train_batch_size"} & set(unread)
    assert unread_options([RECIPES[recipe]], {"no_such_option": 1}) == []


TASKS = {
    "bert_large": "MaskedLM",
    "causal_lm": "CausalLM",
    "text_classification": "SequenceClassification",
    "embeddings": "Embeddings",
}


@pytest.mark.parametrize("recipe", TASKS)
def test_the_defaults_of_a_plan_are_those_of_its_recipe(recipe):
    script = runpy.run_path(RECIPES[recipe])
    given = ["--student", "bert-2-64", "--use_cpu", "true", "--bf16", "false"]
    required = ["--dataset", "a", "--teacher", "b"] if recipe in ("text_classification", "embeddings") else []
    options, args = parse_arguments([script["RecipeArguments"], script["TrainingConfig"]], [*given, *required])
    defaults = recipe_defaults(RECIPES[recipe], {})
    planned, config = parse_arguments([PlanArguments, PlannedConfig], given, defaults=defaults)
    names = ("max_steps", "per_device_train_batch_size", "optim", "gradient_accumulation_steps", "warmup_steps")
    for name in (*names, "pooling", "projection", "standardize_targets"):
        assert getattr(config, name) == getattr(args, name)
    assert recipe == "embeddings" or planned.dropout == options.dropout
    assert planned.block_size == (options.max_length if required else options.block_size)
    assert planned.task == TASKS[recipe]


def test_a_recipe_computes_in_bfloat16_on_a_gpu_and_its_file_says_how_long_a_text_is():
    assert recipe_defaults(RECIPES["bert_large"], {}, "l4")["bf16"] is True
    assert recipe_defaults(RECIPES["text_classification"], {"max_length": 32})["block_size"] == 32


def test_the_command_plans_a_recipe_that_is_named_first_or_in_the_file(tmp_path, capsys):
    (tmp_path / "file.yaml").write_text("recipe: bert_large\nper_device_train_batch_size: 2\nseeds: [1]\n")
    small = ["--max_steps", "10", "--block_size", "16"]
    main(["plan", "--config", str(tmp_path / "file.yaml"), *BY_SIZE, *small])
    from_file = capsys.readouterr().out
    assert "2 examples x 1 micro-batches x 1 processes = 2 examples or 32 tokens a step" in from_file
    assert "defaults: those of the recipe bert_large\nnot read, for these are options of a recipe: seeds" in from_file
    main(["plan", "bert_large", "--per_device_train_batch_size", "2", *BY_SIZE, *small])
    assert capsys.readouterr().out == from_file.removesuffix("not read, for these are options of a recipe: seeds\n")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("bert", "The recipe is 'bert'; use one of bert_large, causal_lm, embeddings, image_classification, "),
        ("pcfg", "pcfg.py follow from options of its own, which a plan does not know; name both with --student"),
    ],
)
def test_a_recipe_that_is_not_planned_is_refused(capsys, recipe, message):
    with pytest.raises(SystemExit) as error:
        main(["plan", recipe, *BY_SIZE])
    assert error.value.code == 2 and message in " ".join(capsys.readouterr().err.split())
