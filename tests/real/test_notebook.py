"""docs/notebook.ipynb runs from top to bottom, on real backbones."""

import json
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from processing.backbones import backbone_path


pytestmark = pytest.mark.real
ROOT = Path(__file__).resolve().parents[2]


def test_the_notebook_runs_and_its_model_listens(tmp_path):
    for name in ("whisper-tiny.en", "SmolLM2-135M-Instruct"):
        backbone_path(name)
    notebook = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells), "clear the outputs before committing"
    results = nbformat.v4.new_code_cell("print(json.dumps({'before': before, 'after': after, **metrics}))")
    notebook.cells.append(results)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "HF_HUB_OFFLINE": "1"})

    found = json.loads(results.outputs[0]["text"])
    assert found["before"]["true"] > found["after"]["true"] < found["after"]["shuffled"]  # the warm start
    assert found["eval_true_loss"] < found["eval_shuffled_loss"]
    pictures = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
    said = cells[-1].outputs[-1]["text"]
    assert said.count("said: ") == said.count("heard: ") == 3
