"""What belongs to no one command: help, doctor, missing extras, and the program as a user starts it."""

import json
import subprocess
import sys

import pytest
from cli.tiny import QUICK
from helpers import run

import fastlora
from fastlora import cli


def test_doctor(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    for word in (
        f"fastlora        {fastlora.__version__}",
        "python ",
        "torch ",
        "triton ",
        "open_clip ",
        "extension ",
        "backend ",
    ):
        assert word in out


def test_help_and_version(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(f"  {name} " in out for name in cli.COMMANDS)
    assert list(cli.COMMANDS) == ["train", "eval", "report", "compare", "merge", "tune", "doctor"]
    assert run(capsys)[0] == 2
    assert run(capsys, "--version")[1] == f"fastlora {fastlora.__version__}\n"
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0 and f"usage: fastlora {command}" in capsys.readouterr().out


def test_unknown_command(capsys):
    code, _, err = run(capsys, "trian")
    assert (
        code == 2
        and "no command 'trian'; accepted: train, eval, report, compare, merge, tune, doctor. Did you mean 'train'?"
        in err
    )


def test_missing_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    code, _, err = run(capsys, "train", *QUICK)
    assert code == 1 and "needs jsonargparse, which is not installed. Run: pip install 'fastlora[train]'" in err


def test_quick_commands_do_not_import_torch():
    """`--help`, `--print_config` and wrong command lines answer at once."""
    code = "import sys; from fastlora import cli\ntry: cli.main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "print('torch' in sys.modules)"
    for arguments in (["--help"], ["train", "--print_config"], ["train", "--nonsense"], ["tune", "--rank=many"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
        assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_terminated_as_a_user_does_it(tmp_path):
    """The demo in a process of its own: SIGTERM after the first line, exit code 143, a readable run."""
    command = [sys.executable, "-m", "fastlora.cli", "train", "--method.rank=2", "--out", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        first = process.stdout.readline()
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert first.startswith("codyra  before training:")
    assert process.returncode == 143 and "terminated" in err and "Traceback" not in err
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "interrupted"
    assert len((tmp_path / "run" / "accuracy.csv").read_text().splitlines()) == 2
