"""Two commits side by side: which library is measured, what is told, and what stays behind."""

import json
import subprocess
import sys
from pathlib import Path

import compare
import pytest

ROOT = Path(compare.__file__).parent.parent


def run(*options, cwd=ROOT):
    command = [sys.executable, str(ROOT / "bench" / "compare.py"), *options]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_the_working_tree_with_itself(tmp_path):
    """From a directory that has a fastlora of its own: it is not what is measured."""
    out = tmp_path / "compare.json"
    done = run(".", ".", "--small", "--rounds", "1", "--out", str(out), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "Counts that changed: none." in done.stdout and "| ProxAdamW step, 144 adapters | " in done.stdout
    found = json.loads(out.read_text())
    assert found["base"] == found["head"] == "working tree"
    assert all(ratio > 0 for ratios in found["ratios"].values() for ratio in ratios)
    assert found["counts"]["layer 768 -> 768, forward + backward: bytes kept"][0] > 0


def test_rounds_alternate_and_ratios_are_head_over_base(monkeypatch):
    order, seconds = [], iter((2.0, 1.0, 3.0, 6.0))

    def measured(tree, small):
        order.append(tree.name)
        count = {"base": 7, "head": 5}[tree.name]
        return {"seconds": {"a call": next(seconds)}, "counts": {"a call: operations": count}}

    monkeypatch.setattr(compare, "measure", measured)
    result = compare.compare(Path("base"), Path("head"), rounds=2, small=True)
    assert order == ["base", "head", "head", "base"]
    assert result["ratios"] == {"a call": [1.0 / 2.0, 3.0 / 6.0]} and result["seconds"] == {"a call": 2.0}
    told = compare.table(result)
    assert "| a call | 0.500 | 0.500 | 0.500 | 2000.00 |" in told
    assert told.endswith("Counts that changed: a call: operations: 7 -> 5.")


def test_a_library_from_elsewhere_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="was measured, not .*another fastlora comes first"):
        compare.measure(tmp_path, small=True)


def test_wrong_arguments():
    assert "no-such-commit" in (done := run("no-such-commit", ".")).stderr and done.returncode == 1
    assert "--rounds is 0; give at least 1" in run(".", ".", "--rounds", "0").stderr
