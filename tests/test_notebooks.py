"""The notebooks run from top to bottom on small models.

Each exists as text, `notebooks/*.py`, and with outputs, `notebooks/*.ipynb`, which `make notebooks` writes from a run.
"""

from __future__ import annotations

import re
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

from tests.cli.conftest import make_llama

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))


def small_parameters(name: str, folder: Path) -> dict[str, object]:
    """Return the values that replace those in a notebook's parameter cell."""
    text = folder / "text.txt"
    text.write_text("a b c d e f g h\n\nh g f e d c b a\n\n" * 60)
    model = make_llama(folder / "llama", 64)
    language = {
        "model_id": str(model),
        "dataset": str(text),
        "dataset_name": None,
        "column": "text",
        "samples": 6,
        "seqlen": 16,
    }
    labels = [{"class_labels": [i, i + 5]} for i in range(4)]
    return {
        "01_language_model": language,
        "02_diffusion_pipeline": {"pipeline_id": "digits", "calls": labels, "steps": 8},
        "03_choosing_bits": {**language, "budget": 6.0},
        "04_lora": {"model_id": str(model), "texts": ["a b c d e f g h " * 4, "h g f e " * 8], "steps": 12},
    }[name]


def with_parameters(notebook: nbformat.NotebookNode, parameters: dict[str, object]) -> nbformat.NotebookNode:
    """Append other values to a notebook's parameter cell, and disable its installs."""
    (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    assert set(parameters) <= set(re.findall(r"\b(\w+)\b(?=[^=\n]*=)", cell.source))
    cell.source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    for other in notebook.cells:
        if "pip install" in other.source:
            other.source = "# " + other.source.lstrip("# ")
    return notebook


def run(file: Path, folder: Path) -> nbformat.NotebookNode:
    """Run a notebook in a folder of its own."""
    notebook = with_parameters(jupytext.read(file), small_parameters(file.stem, folder))
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    return client.execute()


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=[file.stem for file in NOTEBOOKS])
def test_each_runs(file, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = run(file, tmp_path)
    outputs = [output for cell in done.cells for output in cell.get("outputs", [])]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error"]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=[file.stem for file in NOTEBOOKS])
def test_text_and_notebook_are_of_one_source(file):
    text, stored = jupytext.read(file), nbformat.read(file.with_suffix(".ipynb"), as_version=4)
    assert [cell.source for cell in stored.cells] == [cell.source for cell in text.cells]
    assert any(cell.get("outputs") for cell in stored.cells)
    assert "colab.research.google.com" in stored.cells[0].source
