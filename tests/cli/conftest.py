"""The command line in this process, in a directory of its own, with a benchmark of seconds."""

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("jsonargparse")

from cli.tiny import QUICK, tiny  # noqa: E402
from helpers import run  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from fastlora.continual import benchmarks  # noqa: E402


@pytest.fixture(autouse=True)
def tiny_benchmark(monkeypatch, tmp_path):
    presets = {"codyra": {"kappa_max": 0.4}}
    monkeypatch.setitem(benchmarks.BENCHMARKS, "tiny", benchmarks.Benchmark(tiny, presets=presets))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_plots(monkeypatch):
    """Drawing takes longer than training here; for the tests that look at neither page nor plots."""
    monkeypatch.setattr("fastlora.continual.report.write_report", lambda path: None)


@pytest.fixture
def trained(capsys, tmp_path, no_plots):
    """base.safetensors, and a run with the state after each of its tasks."""
    state = {key: value.clone() for key, value in tiny().model.state_dict().items()}
    save_file(state, tmp_path / "base.safetensors", {"origin": "test"})
    assert run(capsys, "train", *QUICK, "--checkpoints=all", "--out=run")[0] == 0
    return tmp_path / "run"
