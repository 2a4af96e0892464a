"""The notebook runs in a kernel of its own and prints what is committed, but for digits.

After a change: jupyter execute --inplace examples/first_run.ipynb
"""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("open_clip")

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "first_run.ipynb"


def printed(notebook) -> list[str]:
    """By cell of code, without warnings; figures may differ from processor to processor, and their widths with them."""
    cells = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    assert {output.output_type for outputs in cells for output in outputs} == {"stream"}
    texts = ["".join(output.text for output in outputs if output.name == "stdout") for outputs in cells]
    return [re.sub(r" *-?\d+(\.\d+)?(e[+-]\d+)?", " #", text) for text in texts]


def test_the_notebook_runs_and_prints_what_it_shows(tmp_path):
    committed = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(committed)
    again = copy.deepcopy(committed)
    nbclient.NotebookClient(again, timeout=None, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert all(printed(committed)), "a cell shows no output"
    assert printed(again) == printed(committed)
