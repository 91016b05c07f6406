"""README and docs: links lead somewhere, examples run, commands name files, messages are the library's."""

import ast
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import tiny_bert
from transformers import (
    BertForSequenceClassification,
    BertTokenizerFast,
    DataCollatorForLanguageModeling,
    TrainingArguments,
)

import hf_curriculum_distill
from hf_curriculum_distill.cli import main
from hf_curriculum_distill.planning import GPUS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
by_name = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def prose(page):
    """A page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def anchors(page):
    """The names of a page's headings, as GitHub and the site make them."""
    for title in re.findall(r"^#+ (.*)", prose(page), re.MULTILINE):
        given = re.search(r"\{#([\w-]+)\}$", title)
        yield given[1] if given else re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-")


@by_name
def test_links_lead_to_files_and_headings_that_are_there(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in set(anchors(file)), target


def test_the_site_has_each_page_once_and_links_to_nothing_outside():
    nav = (ROOT / "mkdocs.yml").read_text().partition("nav:")[2].partition("markdown_extensions")[0]
    assert sorted(re.findall(r"- (\w+\.md)", nav)) == [page.name for page in PAGES if page.parent.name == "docs"]
    assert not any(re.search(r"\]\(\.\./", page.read_text()) for page in PAGES if page.parent.name == "docs")


@by_name
def test_commands_name_files_that_are_there(page):
    shell = " ".join(blocks(page, "bash")) + " ".join(re.findall(r"`([^`]*)`", prose(page)))
    names = re.findall(r"(?<![\w/.-])(?:recipes|benchmarks|notebooks)/[a-z][\w/]*\.\w+", shell)
    if page.stem == "log":  # it names scripts of its time
        return
    assert not [name for name in names if not (ROOT / name).is_file()]


def test_readme_is_a_landing_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


# ---- examples ----


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the examples take for granted."""
    monkeypatch.chdir(tmp_path)
    tokenizer = BertTokenizerFast.from_pretrained(ROOT / "recipes/data/bert_uncased")
    student, teacher = (tiny_bert(depth, vocab_size=len(tokenizer)) for depth in (2, 4))
    classifier = tiny_bert(1, model_class=BertForSequenceClassification)
    for folder in ("teacher", "encoder"):
        (teacher if folder == "teacher" else teacher.bert).save_pretrained(tmp_path / folder)
    examples = [{"input_ids": torch.randint(5, 1000, (12,))} for _ in range(8)]
    return {
        "__name__": __name__,
        "student": student,
        "teacher": teacher,
        "tokenizer": tokenizer,
        "collator": DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5),
        "train": examples,
        "test": examples,
        "metrics": lambda prediction: {},
        "TrainingArguments": TrainingArguments,
        "classifier": classifier.eval(),
        "inputs": {"input_ids": torch.randint(5, 50, (4, 6))},
        "labels": torch.tensor([0, 1, 1, 0]),
        "teacher_logits": torch.randn(4, 2),
    }


FOLDERS = {"google-bert/bert-large-uncased": "teacher", "you/your-student": "teacher"}
FOLDERS["sentence-transformers/all-MiniLM-L6-v2"] = "encoder"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_examples_run(page, names):
    for block in blocks(page, "python"):
        for name, folder in FOLDERS.items():
            block = block.replace(name, folder)
        if ".train()" in block:
            block = re.sub(r"max_steps=[\d_]+", "max_steps=4", block)
        exec(compile(block, str(page), "exec"), names)


def test_readme_has_the_hours_that_plan_forecasts(tmp_path, capsys):
    (command,) = [one for one in blocks(ROOT / "README.md", "bash") if "plan" in one]
    main([*command.split()[1:], "--json", str(tmp_path / "plan.json")])
    total = json.loads((tmp_path / "plan.json").read_text())["total"]
    readme, names = (
        (ROOT / "README.md").read_text(),
        {"A100 SXM": "a100", "H100 SXM": "h100", "L4": "l4", "RTX 4090": "rtx4090"},
    )
    for name, gpu in names.items():
        hours = total["flops"] / (0.4 * GPUS[gpu].peak["bfloat16"]) / 3600
        assert f"| {name} | {hours:.1f} | {total['memory']['total'] / 2**30:.1f} GiB |" in readme


# ---- troubleshooting ----


def strings(node):
    """The text of a literal, with a null character for each value that is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(strings(part) for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "\0"


def test_messages_that_are_explained_are_the_librarys():
    library = Path(hf_curriculum_distill.__file__).parent
    literals = {
        strings(node)
        for path in library.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.JoinedStr, ast.Constant))
    }
    page = (ROOT / "docs/troubleshooting.md").read_text()
    messages = [" ".join(block.replace("> ", "").split()) for block in re.findall(r"(?:^> .*\n)+", page, re.MULTILINE)]
    assert len(messages) > 20
    for message in messages:
        parts = [part.strip(" .,") for part in message.split("...")]
        for part in filter(None, parts):
            assert any(part in literal for literal in literals), part


def test_each_explanation_has_an_anchor_of_its_own():
    page = (ROOT / "docs/troubleshooting.md").read_text()
    headings = re.findall(r"^### .*", page, re.MULTILINE)
    named = [re.search(r"\{#([\w-]+)\}$", heading) for heading in headings]
    assert all(named) and len({one[1] for one in named}) == len(headings)
