"""What fuzzing (bench/fuzz.py) has found, read again; and the promise itself, which must be one that can be broken."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("scipy")  # writes the MATLAB files
if not hasattr(os, "fork"):
    pytest.skip("needs fork, to outlive what an input may do", allow_module_level=True)

from faults.case import in_child  # noqa: E402
from fuzzed import contract  # noqa: E402
from fuzzed.contract import Part, Reader, Trial, little_memory  # noqa: E402
from fuzzed.readers import READERS  # noqa: E402

INPUTS = Path(__file__).parent / "inputs"


@pytest.mark.parametrize("name", READERS)
def test_good_files_are_read_and_what_was_found_breaks_no_promise(name, tmp_path):
    def work():
        trial = Trial(READERS[name], tmp_path)
        found = [trial.read(given) for given in trial.seeds()]
        bad, errors = [finding for finding in found if finding], trial.errors
        with little_memory():
            kept = {path.name: trial.read(path.read_bytes()) for path in sorted((INPUTS / name).glob("*"))}
        return bad, errors, {what: finding for what, finding in kept.items() if finding}

    died, found = in_child(work, seconds=120)
    assert not died and found == ([], 0, {})


def test_every_input_belongs_to_a_reader():
    assert {path.name for path in INPUTS.iterdir()} <= set(READERS)


# ---- the promise


def trial_of(folder, read):
    return Trial(Reader("a file", lambda made: (made / "file").write_bytes(b"good"), (Part("file", read),)), folder)


def raises(error):
    def read(folder):
        if (folder / "file").read_bytes() != b"good":
            raise error

    return read


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("file is damaged"), None),
        (OSError("file cannot be read"), None),
        (ValueError("it is damaged"), "unnamed"),
        (KeyError("file"), "KeyError"),
        (MemoryError(), "MemoryError"),
        (RecursionError("file"), "RecursionError"),
    ],
)
def test_which_errors_are_promised(tmp_path, error, kind):
    trial = trial_of(tmp_path, raises(error))
    assert trial.seeds() == [b"\0good"] and trial.read(b"\0good") is None and not trial.errors
    found = trial.read(b"\0bad")
    assert (found and found.kind) == kind and (tmp_path / "file").read_bytes() == b"good"


def test_what_takes_long_breaks_it(tmp_path, monkeypatch):
    monkeypatch.setattr(contract, "SECONDS", 0.01)
    assert trial_of(tmp_path, lambda folder: time.sleep(0.02)).read(b"").kind == "slow"


def test_what_takes_much_memory_breaks_it(tmp_path, monkeypatch):
    def work():
        monkeypatch.setattr(contract, "MEGABYTES", 50)
        return trial_of(tmp_path, lambda folder: bytearray(100 << 20)).read(b"").kind

    assert in_child(work, seconds=60) == ("", "memory")


def test_what_asks_for_too_much_memory_is_refused(tmp_path):
    def work():
        with little_memory():
            return trial_of(tmp_path, lambda folder: bytearray(1 << 40)).read(b"").kind

    assert in_child(work, seconds=60) == ("", "MemoryError")
