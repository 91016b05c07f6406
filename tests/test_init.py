"""The package as users install it."""

import pkgutil
from pathlib import Path

import pytest
from setuptools import Distribution

import hf_curriculum_distill


def test_the_public_names_are_there():
    assert all(hasattr(hf_curriculum_distill, name) for name in hf_curriculum_distill.__all__)


@pytest.fixture
def installed(monkeypatch):
    """What `pip install` copies: modules `{package.module: file}` and data files `{package: files}`."""
    monkeypatch.chdir(Path(__file__).parents[1])
    distribution = Distribution({"script_name": "setup.py"})
    distribution.parse_config_files(["setup.cfg"])
    build = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    modules = {f"{package}.{module}": file for package, module, file in build.find_all_modules()}
    return modules, {package: files for package, _, _, files in build.data_files}


def test_type_checkers_find_the_marker_in_what_is_installed(installed):
    assert installed[1]["hf_curriculum_distill"] == ["py.typed"]


def test_every_module_and_every_recipe_with_its_configurations_is_installed(installed):
    modules, data = installed
    package = "hf_curriculum_distill"
    found = pkgutil.walk_packages([package], f"{package}.")
    expected = {f"{one.name}.__init__" if one.ispkg else one.name for one in found} | {f"{package}.__init__"}
    recipes = {f"{package}.recipes.{path.stem}" for path in Path("recipes").glob("*.py")}
    assert modules.keys() == expected | recipes
    configs = {str(path.relative_to("recipes")) for path in Path("recipes").glob("**/*.yaml")}
    assert set(data[f"{package}.recipes"]) == configs


def test_a_name_that_is_not_there_is_said_as_of_any_module():
    with pytest.raises(ImportError, match="cannot import name 'Trainer' from 'hf_curriculum_distill'"):
        from hf_curriculum_distill import Trainer  # noqa: F401
