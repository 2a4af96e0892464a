"""The benchmark of several processes: what it counts is what a step exchanges, and the page shows it."""

import json
import sys
from pathlib import Path

import many_processes
import pytest

pytest.importorskip("open_clip")
from distributed import runs  # noqa: E402
from distributed.processes import in_processes  # noqa: E402

PAGE = Path(many_processes.__file__).parent.parent / "docs" / "distributed.md"


def test_bytes_of_a_step_are_those_of_the_formula():
    """4 images and 2 prompts are the larger parts of 7 and 3, and what a process sends; fsdp gathers the blocks twice."""
    (ddp, sizes), *_ = in_processes(2, runs.count_a_step, "ddp")
    (fsdp, _), *_ = in_processes(2, runs.count_a_step, "fsdp")
    expected = many_processes.step_bytes(sizes["parameters"], sizes["width"], images=8, classes=4)
    labels = 8 * 8  # of the batch, gathered before the step
    assert ddp == {"reduced": expected["reduced"], "gathered": expected["gathered"] - labels}
    assert fsdp["reduced"] == ddp["reduced"]
    assert fsdp["gathered"] - ddp["gathered"] == pytest.approx(2 * 4 * sizes["blocks"], rel=0.02)


def test_the_page_shows_what_was_counted_and_measured():
    page = PAGE.read_text()
    assert many_processes.volume_table() in page and "4,425,984 parameters train" in page
    result = json.loads(many_processes.RESULT.read_text()) if many_processes.RESULT.exists() else None
    assert many_processes.steps_table(result) in page


def test_runs_small(tmp_path, monkeypatch, capsys):
    out = tmp_path / "many.json"
    monkeypatch.setattr(sys, "argv", ["many_processes.py", "run", "--small", "--out", str(out)])
    monkeypatch.setattr(many_processes, "volume_table", lambda: "")
    many_processes.main()
    result = json.loads(out.read_text())
    ways = [(1, "alone"), (2, "apart"), (2, "ddp"), (2, "fsdp")]
    assert [(row["processes"], row["way"]) for row in result["rows"]] == ways
    assert result["rows"][0]["bytes"] == result["rows"][1]["bytes"] == {} and all(
        row["seconds"] > 0 for row in result["rows"]
    )
    assert "| 2 | fsdp |" in capsys.readouterr().out
