"""What a run prints, in a terminal, a pipe and a notebook."""

import builtins
import os
import pty
import re
import subprocess
import sys
import types
import warnings

import pytest

from fastlora.continual.progress import Progress

STEPS = """
from fastlora.continual.progress import Progress
import time
with Progress("codyra") as progress:
    progress.start("task 10/11 StanfordCars", 40)
    for done in (10, 20, 30, 40):
        time.sleep(0.06)
        progress.step(done, images=64, loss=1.25, kappa=0.0021, rank=8.5)
    progress.line("task 1/2 red: 80.0 % on it")
"""


def test_terminal():
    """A real one: the bar shows every figure and leaves the line alone when it goes."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    with subprocess.Popen([sys.executable, "-c", STEPS], stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        out = b""
        try:
            while part := os.read(ours, 65536):
                out += part
        except OSError:  # the other end was closed
            pass
    os.close(ours)
    assert process.returncode == 0, out.decode()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.decode())
    for words in (
        "codyra  task 10/11 StanfordCars",
        "10/40",
        "40/40",
        "loss 1.25",
        "kappa 0.0021",
        "rank 8.5",
        "0:00:00",
    ):
        assert words in text
    rates = [int(rate) for rate in re.findall(r"(\d+) images/s", text)]
    assert rates and 2000 < rates[-1] < 64 * 10 / 0.06  # 640 images in 0.06 s or more
    assert "codyra  task 1/2 red: 80.0 % on it" in text and "…" not in text  # nothing cut at 80 columns
    assert out.decode().rstrip().endswith("\x1b[2K")  # the bar is wiped off


def test_pipe_is_one_line_a_task():
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True)
    assert done.stdout == "codyra  task 1/2 red: 80.0 % on it\n" and done.stderr == ""


def test_pipe_is_not_silent_for_long(capsys, monkeypatch):
    """A line every so many seconds, counted from the last line of any kind."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Progress("codyra", every=30.0) as progress:
        progress.start("task 1/2 red", 500)
        for done, seconds in ((10, 10.0), (30, 20.0), (40, 10.0), (100, 60.0)):
            now[0] += seconds
            progress.step(done, images=64, loss=1.25, kappa=None, rank=8.5)
        progress.line("task 1/2 red: done")
        progress.start("task 2/2 green", 500)
        now[0] += 29.0
        progress.step(10, images=64, loss=1.0)
    assert capsys.readouterr().out.splitlines() == [
        "codyra  task 1/2 red: 30/500, loss 1.25, rank 8.5, 64 images/s, 7:50 left",
        "codyra  task 1/2 red: 100/500, loss 1.25, rank 8.5, 64 images/s, 6:40 left",
        "codyra  task 1/2 red: done",
    ]


def test_silent(capsys):
    with Progress("codyra", enabled=False, every=0.0) as progress:
        progress.start("task", 10)
        progress.step(10, images=1, loss=1.0)
        progress.line("text")
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def notebook(monkeypatch):
    """A notebook as rich sees one; what it is asked to display."""
    shown = []

    class ZMQInteractiveShell:
        pass

    class Output:
        def __enter__(self):
            shown.append("bar")

        def __exit__(self, *error):
            return None

        def clear_output(self, wait=False):
            pass

        def close(self):
            shown.append("closed")

    display = types.ModuleType("IPython.display")
    display.display = lambda *things, **more: shown.extend(
        thing.data["text/plain"] if hasattr(thing, "data") else getattr(thing, "text", "widget") for thing in things
    )
    widgets = types.ModuleType("ipywidgets")
    widgets.Output = Output
    widgets.__spec__ = types.SimpleNamespace(name="ipywidgets")
    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    for name, module in (
        ("IPython", types.ModuleType("IPython")),
        ("IPython.display", display),
        ("ipywidgets", widgets),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    return shown


def steps():
    with Progress("codyra") as progress:
        progress.start("task 1/2 red", 40)
        progress.step(20, images=64, loss=1.25)
        progress.line("task 1/2 red: done")


def test_notebook(notebook, capsys):
    steps()
    assert notebook.count("bar") >= 2 and "closed" in notebook
    assert "codyra  task 1/2 red: done\n" in notebook and any("0/40" in shown for shown in notebook)
    assert capsys.readouterr().err == ""


def test_notebook_without_widgets(notebook, capsys, monkeypatch):
    """Lines, as in a pipe, and no warning."""
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monkeypatch.delitem(sys.modules, "ipywidgets")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps()
    assert capsys.readouterr().out == "codyra  task 1/2 red: done\n" and notebook == []
