"""The package as users install it."""

from pathlib import Path

from setuptools import Distribution

import hf_curriculum_distill


def test_the_public_names_are_there():
    assert all(hasattr(hf_curriculum_distill, name) for name in hf_curriculum_distill.__all__)


def test_type_checkers_find_the_marker_in_what_is_installed(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    distribution = Distribution()
    distribution.parse_config_files(["setup.cfg"])
    build = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    assert ("hf_curriculum_distill", ["py.typed"]) in [(package, files) for package, _, _, files in build.data_files]
