"""The package as a command."""

import subprocess
import sys
from importlib.metadata import version

import pytest

LIGHT = "import sys; from hf_curriculum_distill.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
LIGHT += "print({'torch', 'transformers', 'yaml'} & {*sys.modules})"


def run(*command):
    return subprocess.run([sys.executable, *command], capture_output=True, text=True)


def test_the_package_is_the_command():
    done = run("-m", "hf_curriculum_distill", "--version")
    assert done.returncode == 0
    of_library, of_transformers = version("hf_curriculum_distill"), version("transformers")
    assert done.stdout.startswith(f"hf-curriculum-distill {of_library} (transformers {of_transformers}, torch ")


@pytest.mark.parametrize("option", ["--help", "--version", "train --help", "compare --help"])
def test_what_the_command_says_of_itself_needs_no_library(option):
    done = run("-c", LIGHT, *option.split())
    assert done.stdout.splitlines()[-1] == "set()", done.stderr


def test_importing_the_package_imports_no_library_until_a_name_is_used():
    script = "import sys, hf_curriculum_distill as hcd; print('torch' in sys.modules, 'Stage' in dir(hcd)); "
    script += "hcd.losses.kl_divergence; print('torch' in sys.modules, 'transformers.trainer' in sys.modules)"
    done = run("-c", script)
    assert done.stdout.split() == ["False", "True", "True", "False"], done.stderr
