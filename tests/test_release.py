"""What a release says of itself: one version, metadata, and workflows for what is supported."""

import re
from configparser import ConfigParser
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import hf_curriculum_distill

ROOT = Path(__file__).parents[1]
VERSION = hf_curriculum_distill.__version__
SETUP = ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def read_workflow(name):
    text = (ROOT / f".github/workflows/{name}.yml").read_text()
    return yaml.load(text, yaml.BaseLoader)  # another loader reads `on` as True


def test_the_version_is_written_in_one_module():
    assert SETUP["metadata"]["version"] == "attr: hf_curriculum_distill.__version__"
    assert version("hf_curriculum_distill") == VERSION


def test_the_changelog_begins_with_this_version():
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == VERSION


def test_the_citation_is_of_this_version_and_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["version"] == VERSION
    assert citation["license"] == SETUP["metadata"]["license"]
    assert citation["message"] and citation["authors"]
    assert "2503.17494" in citation["preferred-citation"]["url"]


def test_the_tests_run_on_each_python_of_the_classifiers_and_the_oldest_transformers():
    matrix = read_workflow("test")["jobs"]["tests"]["strategy"]["matrix"]
    classified = re.findall(r"Python :: (3\.\d+)", SETUP["metadata"]["classifiers"])
    oldest, below = re.search(r"transformers>=([\d.]+),(<\d+)", SETUP["options"]["install_requires"]).groups()
    assert matrix["python"] == classified
    assert matrix["transformers"] == [f"=={oldest}.*", below]
    assert SETUP["options"]["python_requires"] == f">={classified[0]}"


def test_what_is_published_was_tested_and_built_from_the_tag():
    workflow = read_workflow("release")
    publish = workflow["jobs"]["publish"]
    assert workflow["on"] == {"push": {"tags": ["v*"]}}
    assert set(publish["needs"]) == {"test", "build"} and publish["permissions"] == {"id-token": "write"}
    check = next(step["run"] for step in workflow["jobs"]["build"]["steps"] if "grep" in step.get("run", ""))
    pattern = re.search(r'"(.*)" ', check)[1].replace("\\", "").replace("${GITHUB_REF_NAME#v}", VERSION)
    assert pattern in (ROOT / "hf_curriculum_distill/__init__.py").read_text().splitlines()


@pytest.mark.parametrize("place", ["Dockerfile", "Makefile"])
def test_a_command_names_files_that_are_there(place):
    names = re.findall(r"[\w/]+\.(?:yaml|py|cfg|toml|txt|cff)\b", (ROOT / place).read_text())
    assert names and all((ROOT / name).is_file() for name in names)
