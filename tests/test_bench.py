"""Benchmarks rot unseen: each runs here on tiny shapes, and the committed table can be printed."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_every_benchmark_runs_on_tiny_shapes():
    pytest.importorskip("peft")
    done = run(
        sysconfig.get_path("scripts") + "/pytest",
        "bench",
        "--small",
        "-q",
        "--benchmark-disable",
        "-p",
        "no:cacheprovider",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "failed" not in done.stdout


def test_the_committed_table_is_what_the_readme_shows():
    done = run(sys.executable, "bench/demo_table.py", "--show", "bench/results/demo.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in (ROOT / "README.md").read_text()


def test_codyra_forgets_less_and_learns_less_in_the_committed_results():
    result = json.loads((ROOT / "bench/results/demo.json").read_text())
    codyra, lora, zero_shot = ({k: g["own"][k]["mean"] for k in g["own"] if k != "accuracy"} for g in result["groups"])
    assert codyra["forgetting"] <= 0.4 * lora["forgetting"]
    assert codyra["held_out"] >= lora["held_out"] + 5
    assert zero_shot["learning"] < codyra["learning"] < lora["learning"]
    expected = result["groups"][0]["null_model"]["expected_rank"]
    # 3 seeds x 6 tasks x 42 modules, each kept rank binomial: three standard errors
    assert abs(codyra["mean_rank"] - expected) < 3 * (expected * (1 - expected / 16) / (3 * 6 * 42)) ** 0.5
