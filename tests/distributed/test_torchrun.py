"""The command under torchrun: one run, told about once."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("jsonargparse")

from cli.tiny import QUICK, tiny  # noqa: E402
from distributed import runs  # noqa: E402
from distributed.processes import in_processes  # noqa: E402
from helpers import run  # noqa: E402

from fastlora import cli  # noqa: E402
from fastlora.continual import benchmarks, read_run  # noqa: E402

TESTS = Path(__file__).parent.parent


def torchrun(*arguments, **environment):
    """(exit code, stdout, stderr less what torchrun itself says)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    path = os.pathsep.join([str(TESTS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    done = subprocess.run(
        [*command, str(TESTS / "distributed" / "tiny_command.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment,
    )
    return done.returncode, done.stdout, [line for line in done.stderr.splitlines() if line.startswith("fastlora")]


@pytest.mark.slow
def test_a_killed_process_and_resume_in_one(tmp_path, capsys, monkeypatch):
    """As users see it: what is finished is printed once, the others stop with one message, one process goes on."""
    out = tmp_path / "run"
    code, told, errors = torchrun("train", *QUICK, "--device=cpu", "--out", out, KILL="1")
    assert code != 0 and told.count("codyra  task 1/2 red") == 1 and "task 2/2" not in told
    assert len(errors) == 1 and "The same command with --resume goes on" in errors[0]
    # torchrun may end process 0 before it finds out itself
    assert "a process that takes part in this run cannot be reached" in errors[0] or "torchrun ended" in errors[0]
    assert read_run(out).record.finished_tasks == 1

    presets = {"codyra": {"kappa_max": 0.4}}
    monkeypatch.setitem(benchmarks.BENCHMARKS, "tiny", benchmarks.Benchmark(tiny, presets=presets))
    monkeypatch.setattr("fastlora.continual.report.write_report", lambda path: None)
    for name in ("resumed", "whole"):
        path, more = (out, ["--resume"]) if name == "resumed" else (tmp_path / "whole", [])
        assert run(capsys, "train", *QUICK, "--device=cpu", "--out", path, *more)[0] == 0
    resumed, whole = read_run(out), read_run(tmp_path / "whole")
    assert resumed.record.own == whole.record.own and resumed.record.union == whole.record.union
    assert resumed.manifest["processes"] == 2 and resumed.manifest["resumes"][0]["processes"] == 1


def test_what_is_wrong_is_told_once(tmp_path):
    """Alike in all, in process 0 for all, and in one, which the others follow."""
    quick = ["train", *QUICK, "--device=cpu", "--out", str(tmp_path / "run")]
    taken = ["train", *QUICK, "--device=cpu", "--out", str(tmp_path)]
    (tmp_path / "mine.txt").write_text("all of it")
    for arguments, message in (
        ([*quick, "--parallel=fsdp", "--compile=default"], "parallel is fsdp, and compile needs the whole weights"),
        (taken, "exists already"),
        ([*quick, "--method.lr=1e30"], "the loss is nan at iteration"),
    ):
        codes, out, err = zip(*in_processes(3, runs.command, arguments))
        told = [line for text in err for line in text.splitlines() if line.startswith("fastlora train: ")]
        assert codes == (1, 1, 1) and len(told) == 1 and message in told[0], err


def test_seeds_start_processes_of_their_own(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, err = run(capsys, "train", "--seeds=2")
    assert (code, out) == (2, "") and "--seeds starts processes of its own; under torchrun give one --seed" in err
    monkeypatch.setenv("RANK", "1")
    assert run(capsys, "train", "--seeds=2") == (2, "", "")


def test_a_second_signal_does_not_cut_short_what_the_first_ends(monkeypatch):
    """torchrun passes Ctrl-C on, and then ends the processes as well."""
    done, before = [], [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def work(argv):
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGTERM)
            done.append("written")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(cli.COMMANDS, "work", (work, ""))
    assert cli.main(["work"]) == 130 and done == ["written"]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_fsdp_alone_says_how_to_start(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(benchmarks.BENCHMARKS, "tiny", benchmarks.Benchmark(tiny))
    code, _, err = run(capsys, "train", *QUICK, "--parallel=fsdp", "--out", tmp_path / "run")
    assert code == 1 and "torchrun --nproc-per-node N -m fastlora train" in err and not (tmp_path / "run").exists()


def test_the_package_is_a_command():
    done = subprocess.run([sys.executable, "-m", "fastlora", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("fastlora ")
