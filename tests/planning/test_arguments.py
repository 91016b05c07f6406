import dataclasses
import runpy
from pathlib import Path

import pytest

from hf_curriculum_distill.cli import main
from hf_curriculum_distill.parsing import parse_arguments
from hf_curriculum_distill.planning import RECIPE_OPTIONS, PlanArguments, PlannedConfig

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes/configs").glob("*/*.yaml")), ids=lambda path: path.stem)
def test_options_of_the_recipes_are_no_errors(path):
    unread = []
    argv = ["--config", str(path), "--student", "bert-2-64", "--output_dir", "out"]
    parse_arguments([PlanArguments, PlannedConfig], argv, unread=unread)
    assert not {"max_steps", "learning_rate", "method", "teacher", "per_device_train_batch_size"} & set(unread)


def test_what_is_not_read_is_an_option_of_a_recipe():
    scripts = [runpy.run_path(str(path)) for path in (ROOT / "recipes").glob("*.py")]
    kinds = [script["RecipeArguments"] for script in scripts if "RecipeArguments" in script]
    of_recipes = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    assert len(kinds) > 2 and of_recipes - {f.name for f in dataclasses.fields(PlanArguments)} == {*RECIPE_OPTIONS} - {
        f.name for f in dataclasses.fields(PlannedConfig)
    }


def test_no_student_and_options_that_compare_lacks_are_errors(capsys):
    for argv, message in ((["plan"], "No student is given"), (["compare", "a", "--student", "b"], "unrecognized")):
        with pytest.raises(SystemExit) as error:
            main(argv)
        assert error.value.code == 2 and message in capsys.readouterr().err
