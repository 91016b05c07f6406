"""Options that several command lines share have one author."""

import dataclasses
import runpy
from pathlib import Path

import pytest
from conftest import tiny_bert

from hf_curriculum_distill.options import ComparisonOptions, ModelOptions, is_saved_model, teacher_source
from hf_curriculum_distill.planning import PlanArguments

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.mark.parametrize(
    "shared, recipes", [(ModelOptions, ["bert_large"]), (ComparisonOptions, ["pcfg", "sparse_parity"])]
)
def test_command_lines_change_nothing_but_the_defaults_of_what_they_share(shared, recipes):
    kinds = [runpy.run_path(str(RECIPES / f"{name}.py"))["RecipeArguments"] for name in recipes]
    kinds += [PlanArguments] if shared is ModelOptions else []
    names = {field.name for field in dataclasses.fields(shared)}
    assert all("help" in field.metadata for field in dataclasses.fields(shared))
    for kind in kinds:
        assert issubclass(kind, shared)
        own = {field.name: field.metadata for field in dataclasses.fields(kind) if field.name in kind.__annotations__}
        assert not [name for name in names & own.keys() if "help" in own[name]]


def test_a_folder_with_a_configuration_and_no_weights_is_no_trained_teacher(tmp_path):
    model = tiny_bert(1)
    model.config.save_pretrained(tmp_path)
    assert not is_saved_model(tmp_path) and teacher_source(str(tmp_path), "bert-2-16") == "bert-2-16"
    model.save_pretrained(tmp_path)
    assert is_saved_model(tmp_path) and teacher_source(str(tmp_path), "bert-2-16") == str(tmp_path)
    assert teacher_source("hub/model", None) == "hub/model"
