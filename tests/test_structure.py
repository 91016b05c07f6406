"""The library's own rules: small files, imports in one direction, one file of tests for each module."""

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import hf_curriculum_distill
from hf_curriculum_distill import CurriculumDistillationTrainer

TESTS = Path(__file__).parent
LIBRARY = Path(hf_curriculum_distill.__file__).parent
NAME = LIBRARY.name
MODULES = {module.name: module for module in pkgutil.walk_packages([str(LIBRARY)], f"{NAME}.")}
SOURCES = {name: Path(importlib.import_module(name).__file__).read_text() for name in MODULES}
# As long as the signatures of Trainer that they repeat.
SPELLED_OUT = {
    f"{NAME}.trainer.CurriculumDistillationTrainer.__init__",
    f"{NAME}.report.trainer.PublishedTrainer.create_model_card",
}


def imports(name):
    """What a module imports, by full names, but for what type checkers alone read."""
    tree = ast.parse(SOURCES[name])
    unread = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    unread = {inner for node in unread for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if node in unread:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                yield inside if inside in MODULES else node.module


def imported_by(name):
    """The library's modules that a module needs, with those that these need."""
    found, left = set(), [name]
    while left:
        for one in imports(left.pop()):
            if one in MODULES and one not in found:
                found.add(one)
                left.append(one)
    return found


@pytest.mark.parametrize("name", MODULES)
def test_a_file_has_at_most_400_lines(name):
    assert len(SOURCES[name].splitlines()) <= 400


def test_the_trainer_has_less_than_450_lines_and_no_function_more_than_seven_parameters():
    assert len(SOURCES[f"{NAME}.trainer"].splitlines()) < 450
    long = set()
    for name, source in SOURCES.items():
        for scope in ast.walk(ast.parse(source)):
            for node in getattr(scope, "body", []) if isinstance(scope, (ast.Module, ast.ClassDef)) else []:
                if not isinstance(node, ast.FunctionDef):
                    continue
                owner = f"{name}.{scope.name}" if isinstance(scope, ast.ClassDef) else name
                parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if len([one for one in parameters if one.arg not in ("self", "cls")]) > 7:
                    long.add(f"{owner}.{node.name}")
    assert long == SPELLED_OUT


def test_no_module_needs_itself():
    assert [name for name in MODULES if name in imported_by(name)] == []


def test_a_training_imports_no_private_module_of_torch():
    training = {f"{NAME}.trainer"} | imported_by(f"{NAME}.trainer")
    private = {
        (name, one)
        for name in training
        for one in imports(name)
        if one.split(".")[0] == "torch" and any(part.startswith("_") for part in one.split("."))
    }
    assert private == set()
    assert f"{NAME}.planning.dry_run" not in training


def test_kinds_of_teachers_are_told_apart_by_their_package_alone():
    kinds = {"Teacher", "FrozenTeacher", "CheckpointTeacher", "OnlineTeacher", "CachedTeacher"}
    asked = {
        name
        for name, source in SOURCES.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "isinstance"
        and kinds & {inner.id for inner in ast.walk(node.args[1]) if isinstance(inner, ast.Name)}
    }
    assert all(name.startswith(f"{NAME}.teachers") for name in asked)


@pytest.mark.parametrize("name", [name for name, module in MODULES.items() if not module.ispkg])
def test_a_module_has_tests_in_a_file_of_its_name(name):
    *folders, module = name.split(".")[1:]
    assert TESTS.joinpath(*folders, f"test_{module}.py").is_file()


def test_the_trainers_parameters_are_those_of_trainer_and_its_own_two():
    own = inspect.signature(CurriculumDistillationTrainer).parameters
    stock = inspect.signature(CurriculumDistillationTrainer.__mro__[4]).parameters
    assert CurriculumDistillationTrainer.__mro__[4].__name__ == "Trainer"
    assert list(own) == [*stock, "teacher_model", "projection_bank"]
    assert [own[name].default for name in stock] == [parameter.default for parameter in stock.values()]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("layers", "find_block_stack"),
        ("layers", "PartialForward"),
        ("batches", "SeededBatches"),
        ("teachers", "FrozenTeacher"),
        ("teachers", "CheckpointTeacher"),
        ("report", "format_summary"),
        ("cost", "count_flops"),
        ("losses", "kl_divergence"),
        ("projections", "ProjectionBank"),
        ("metrics", "CountedAccuracy"),
    ],
)
def test_modules_that_have_become_packages_keep_their_names(module, name):
    assert hasattr(importlib.import_module(f"{NAME}.{module}"), name)


@pytest.mark.parametrize(
    "page", [*(TESTS.parent / "docs").glob("*.md"), TESTS.parent / "README.md"], ids=lambda p: p.name
)
def test_a_test_that_the_docs_name_is_there(page):
    for path, name in re.findall(r"([\w/]+\.py)::(\w+)", page.read_text()):
        file = TESTS / path.removeprefix("tests/")
        assert file.is_file() and f"def {name}(" in file.read_text(), f"{path}::{name}"
