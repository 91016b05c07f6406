"""The notebook runs from top to bottom, and what is committed shows what it prints."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FILE = Path(__file__).parents[1] / "notebooks/quickstart.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(FILE, as_version=4)


def printed(notebook):
    """What cells print as text, and the types of all that they show."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert "error" not in {output.output_type for output in outputs}
    text = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    return text, {kind for output in outputs for kind in output.get("data", {})}


def shows_stages_progress_comparison_and_plot(notebook):
    text, kinds = printed(notebook)
    assert "layers 1-4 " in text and "kl + layers 1-4 " in text and "1 <- 1, 2 <- 2, 3 <- 3, 4 <- 4" in text
    assert "\ncurriculum" in text and "\none_shot" in text and "The plot needs" not in text
    assert {"image/png", "text/html"} <= kinds


def test_it_runs_from_top_to_bottom(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("NOTEBOOK_STEPS", "2")
    monkeypatch.setenv("NOTEBOOK_HELDOUT", "4")
    monkeypatch.setenv("NOTEBOOK_OUTPUT", str(tmp_path))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": FILE.parent}}).execute()
    shows_stages_progress_comparison_and_plot(notebook)
    assert (tmp_path / "curriculum/model.safetensors").is_file()


def test_its_outputs_are_committed_and_come_from_one_run(notebook):
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == [*range(1, len(counts) + 1)]
    shows_stages_progress_comparison_and_plot(notebook)
    assert "/" + "root/" not in FILE.read_text() and "/" + "work/" not in FILE.read_text()
