"""`fastlora tune` on the command line; what it measures is in test_tune.py."""

from pathlib import Path

import pytest
import torch
from helpers import run

pytest.importorskip("open_clip")

import fastlora  # noqa: E402


@pytest.fixture
def tuned(monkeypatch):
    """Arguments of the calls of `tune`, which measures nothing."""
    seen = []

    def measure(calls, device, *, progress, **options):
        progress("one line")
        seen.append((list(calls), device, options))
        return "the report"

    monkeypatch.setattr("fastlora.tune.tuning.tune", measure)
    return seen


def test_tune_measures_the_calls_of_the_demo(capsys, tuned):
    code, out, err = run(capsys, "tune", "--device=cpu", "--rank=4", "--batch=2", "--texts=3", "--out=table.json")
    assert code == 0 and err == "one line\n"
    assert out.startswith("the report\n") and "FASTLORA_TABLE=table.json" in out
    ((calls, device, options),) = tuned
    assert device == torch.device("cpu") and options == {"out": Path("table.json"), "budget_seconds": 60.0}
    assert {call.dtype for call in calls} == {torch.bfloat16} and {call.r for call in calls} == {4, 12}
    assert {call.m for call in calls} == {2 * 17, 3 * fastlora.open_clip_demo().model.context_length}


def test_tune_of_an_architecture_of_open_clip(capsys, tuned):
    arguments = ("--device=cpu", "--model=ViT-S-32-alt", "--where=vision", "--dtype=float16", "--batch=2")
    code, out, _ = run(capsys, "tune", *arguments)
    assert code == 0 and out == "the report\n"
    ((calls, _, options),) = tuned
    assert options["out"] is None and {call.dtype for call in calls} == {torch.float16}
    assert {(call.m, call.n, call.k) for call in calls} == {
        (100, 1152, 384), (100, 384, 384), (100, 1536, 384), (100, 384, 1536)
    }  # fmt: skip


def test_tune_refuses(capsys, tuned, monkeypatch):
    code, _, err = run(capsys, "tune", "--device=cpu", "--model=ViT-B-17")
    assert code == 2 and "--model 'ViT-B-17' is no architecture of open_clip; near: ViT-B-16" in err
    for wrong in ("--batch=0", "--texts=0"):
        code, _, err = run(capsys, "tune", "--device=cpu", wrong)
        assert code == 2 and "both must be >= 1" in err
    code, _, err = run(capsys, "tune", "--device=cpu", "--rank=0")
    assert code == 1 and "rank is 0; it must be >= 1" in err
    monkeypatch.setattr("fastlora.tune.tuning.interpreting", lambda: False)
    for device in ("cpu", "mps"):
        code, _, err = run(capsys, "tune", "--device", device)
        assert code == 1 and "the dispatch tables are for CUDA and ROCm devices" in err
    assert not tuned
