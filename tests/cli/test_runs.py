"""`train`, `report`, `eval`, `compare`: runs, and what stops them."""

import json
import os
import re
import signal
import threading

import pytest
import torch
import yaml
from cli.tiny import QUICK
from helpers import run
from safetensors.torch import load_file, save_file

from fastlora import cli
from fastlora.continual.config import CONFIGS


def test_train_report_eval_compare(capsys, tmp_path):
    """The way of a user: train two methods, look at one again, evaluate it again, compare."""
    code, out, err = run(capsys, "train", *QUICK)
    assert code == 0 and err == ""
    path = tmp_path / "runs" / "tiny-codyra-seed0"
    assert f"Report: {path.relative_to(tmp_path) / 'report.html'}" in out and "Learning %" in out
    assert (path / "report.html").stat().st_size > 50_000 and len(list((path / "plots").iterdir())) >= 6
    assert yaml.safe_load((path / "config.yaml").read_text())["method"]["kappa_max"] == 0.4  # the preset is in effect

    assert run(capsys, "train", "--benchmark=tiny", "--method=zero_shot", "--out=zero")[0] == 0
    (path / "report.html").unlink()
    code, out, _ = run(capsys, "report", path)
    assert code == 0 and "codyra on tiny, seed 0: finished" in out and (path / "report.html").exists()

    for task in (None, 0, 1, 2):
        code, out, _ = run(capsys, "eval", path, *([] if task is None else ["--task", task]))
        assert code == 0 and "equal to the recorded row" in out
    assert "checkpoints/task_02.safetensors" in out

    code, out, _ = run(capsys, "compare", path, "zero", "--out", "plot.png")
    assert code == 0 and "zero_shot" in out and "nothing forgets nothing" in out
    assert "Comparison: plot.png" in out and (tmp_path / "plot.png").exists() and str(path / "plots") in out
    code, out, _ = run(capsys, "compare", path, "zero", "--json")
    assert code == 0 and [group["label"] for group in json.loads(out)["groups"]] == ["codyra r=2", "zero_shot"]


@pytest.mark.parametrize(
    ("method", "source"),
    [
        ("full", "checkpoints/task_02.safetensors"),
        ("joint", "checkpoints/task_01.safetensors"),
        ("per_task", "the base model and 2 adapter files"),
    ],
)
def test_eval_of_methods_that_leave_no_sequence_of_adapters(capsys, tmp_path, no_plots, method, source):
    quick = [option for option in QUICK if method != "full" or "rank" not in option]
    assert run(capsys, "train", *quick, "--method", method, "--method.lr=0.01", "--out=run")[0] == 0
    code, out, _ = run(capsys, "eval", "run")
    assert code == 0 and f"from {source}" in out and "equal to the recorded row" in out
    code, out, err = run(capsys, "eval", "run", "--task", 1)
    if method == "full":
        assert code == 1 and "Train with --checkpoints all" in err
    else:
        assert code == 0 and "equal to the recorded row" in out


def test_eval_says_when_the_weights_are_others(capsys, tmp_path, no_plots):
    run(capsys, "train", *QUICK, "--out=run")
    checkpoint = tmp_path / "run" / "checkpoints" / "task_02.safetensors"
    state = load_file(checkpoint)
    state["visual.proj"] = -state["visual.proj"]  # every image feature turned round
    save_file(state, checkpoint)
    code, out, _ = run(capsys, "eval", "run")
    assert code == 0 and re.search(r"differs from the recorded row by up to \d", out)
    checkpoint.write_bytes(b"no weights")
    code, _, err = run(capsys, "eval", "run")
    assert code == 1 and "does not fit the benchmark's model" in err


def test_eval_refuses_another_test_set(capsys, tmp_path, no_plots):
    run(capsys, "train", *QUICK, "--out=run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    manifest["hashes"]["blue"]["test_labels_sha256"] = "0" * 64
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    code, _, err = run(capsys, "eval", "run")
    assert code == 1 and "'blue' has other test labels" in err


def test_a_run_that_exists_is_never_touched(capsys, tmp_path, no_plots):
    run(capsys, "train", "--benchmark=tiny", "--method=zero_shot", "--out=run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    code, out, err = run(capsys, "train", *QUICK, "--out=run")
    assert code == 1 and re.search("run exists already .a run, finished, 2 of 2 tasks.; .* Pass another --out", err)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", ["report", "eval", "compare"])
def test_no_run(capsys, command):
    code, _, err = run(capsys, command, "nowhere")
    assert code == 1 and "nowhere is not a run directory" in err


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_a_readable_run(capsys, no_plots, monkeypatch, sent, code):
    """The signal arrives in the second task."""
    from fastlora.continual.methods import CoDyRA

    def after_step(self, ctx):
        if ctx.number == 2:
            os.kill(os.getpid(), sent)

    monkeypatch.setattr(CoDyRA, "after_step", after_step)
    handler = signal.getsignal(signal.SIGTERM)
    got, _, err = run(capsys, "train", *QUICK, "--out=run")
    assert got == code and "run holds the finished tasks; `fastlora report run` shows them" in err
    assert signal.getsignal(signal.SIGTERM) is handler
    got, out, _ = run(capsys, "report", "run")
    assert got == 0 and "codyra on tiny, seed 0: interrupted" in out and "after 1 red" in out and "after 2" not in out


def test_resume(capsys, no_plots, monkeypatch, tmp_path):
    """The same command with --resume, after a failure and after the end."""
    from fastlora.continual.methods import CoDyRA

    assert run(capsys, "train", *QUICK, "--out=whole", "--resume")[0] == 0  # nothing there: a new run
    with monkeypatch.context() as patch:
        patch.setattr(CoDyRA, "extra_loss", lambda self, ctx: torch.tensor(float("nan")) if ctx.number == 2 else None)
        code, _, err = run(capsys, "train", *QUICK, "--out=run")
        assert code == 1 and "loss is nan" in err and "the same command with --resume goes on from there" in err
    code, _, err = run(capsys, "train", *QUICK, "--out=run", "--method.lr=1", "--resume")
    assert code == 1 and "method.lr was 0.0005 and is 1.0 now" in err and "Give the options that" in err
    code, out, _ = run(capsys, "train", *QUICK, "--out=run", "--resume")
    assert code == 0 and "resumed after task 1/2; before, the run was stopped by an error (FloatingPointError" in out
    for file in ("accuracy.csv", "accuracy_union.csv", "log.csv", "ranks.csv", "metrics.json", "config.yaml"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    weights = [load_file(tmp_path / name / "checkpoints" / "task_02.safetensors") for name in ("run", "whole")]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())

    before = (tmp_path / "run" / "manifest.json").read_bytes()
    code, out, _ = run(capsys, "train", *QUICK, "--out=run", "--resume")
    assert code == 0 and "run is finished already; nothing was trained" in out and "Learning %" in out
    assert (tmp_path / "run" / "manifest.json").read_bytes() == before
    code, _, err = run(capsys, "train", *QUICK, "--seed=1", "--out=run", "--resume")
    assert code == 1 and "seed was 0 and is 1 now" in err


@pytest.mark.parametrize("method", sorted(CONFIGS.keys() - {"zscl"}))  # which needs reference data
def test_dry_run(capsys, tmp_path, method):
    code, out, err = run(capsys, "train", "--benchmark=tiny", f"--method={method}", "--dry-run", "--out=run")
    assert code == 0 and err == "" and not os.listdir(tmp_path)
    assert f"{method} on tiny, seed 0, on cpu: the plan; nothing is trained." in out
    assert "commit point" in out and "Class names that tasks share: none." in out


@pytest.mark.slow
def test_seeds_on_the_demo(capfd, tmp_path):
    """Two processes; of what is resumed one is finished already, the other damaged."""
    quick = ["--method=zero_shot", "--out", tmp_path]
    code, out, _ = run(capfd, "train", *quick, "--seeds=0,1")
    assert code == 0 and "zero_shot, mean over seeds 0, 1, own" in out and "mean ± s.d. over seeds" in out
    (tmp_path / "seed1" / "manifest.json").write_text("{}")
    (tmp_path / "seed1" / "checkpoints" / "state.safetensors").write_text("no state")
    code, out, err = run(capfd, "train", *quick, "--seeds=0,1", "--resume")
    assert code == 1 and "seed 1 | fastlora train: " in err and "state.safetensors is damaged" in err
    assert "seed 1 of 2 failed; the others are whole" in err
    assert "zero_shot, seed 0, own label space" in out


def test_a_failure_is_one_message(capsys, monkeypatch):
    from fastlora.continual.methods import CoDyRA

    monkeypatch.setattr(CoDyRA, "extra_loss", lambda self, ctx: torch.tensor(float("nan")))
    code, _, err = run(capsys, "train", *QUICK, "--out=run")
    assert code == 1 and "fastlora train: the loss is nan at iteration 0 (from 0) of task 1 (red)" in err


def test_works_outside_the_main_thread(capsys):
    """Where no signal handler can be set, as in a notebook's worker."""
    codes = []
    thread = threading.Thread(target=lambda: codes.append(cli.main(["doctor"])))
    thread.start()
    thread.join()
    assert codes == [0]


def test_selection_of_runs(capsys, tmp_path, no_plots):
    """One file a run; a table, or JSON, and nothing else on stdout."""
    for method in ("codyra", "random_selection"):
        assert run(capsys, "train", *QUICK, "--method", method, "--out", method)[0] == 0
    code, out, err = run(capsys, "compare", "--selection", "codyra", "random_selection")
    assert code == 0 and "codyra on tiny, seed 0, task red, other task blue:" in out and "training 5 of 5" in err
    assert "other gates, same data" in out and "other choice, same data" in out and "written: codyra/selection" in out
    code, out, _ = run(capsys, "compare", "--selection", "--json", "codyra")
    saved = json.loads((tmp_path / "codyra" / "selection.json").read_text())
    assert code == 0 and json.loads(out) == [saved] and len(saved["comparisons"]) == 4
    code, _, err = run(capsys, "compare", "--selection", "codyra", "--out", "x.png")
    assert code == 2 and "--selection draws nothing; leave --out away" in err
