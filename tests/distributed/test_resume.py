"""Runs of several processes that are stopped, and taken up by others."""

import json
import shutil

import pytest

pytest.importorskip("open_clip")

from distributed import runs  # noqa: E402
from distributed.processes import in_processes, started  # noqa: E402

from fastlora.continual import read_run  # noqa: E402
from fastlora.continual.config import InfLoRAConfig  # noqa: E402
from fastlora.journal import Journal  # noqa: E402

LOST = "LostProcess: a process that takes part in this run cannot be reached any more"


def assert_same_end(out, found, expected):
    """The whole run, of which `found` saw the part after it was taken up."""
    assert found["record"] == expected["record"] and found["ranks"] == expected["ranks"]
    assert runs.relative(found["adapters"][-1], expected["adapters"][-1]) < 3e-5
    assert read_run(out).status == "finished" and len(Journal(out / "adapters")) == 2


@pytest.mark.parametrize("kind", ["codyra", "inflora"])
def test_another_number_of_processes_goes_on(tmp_path, kind):
    """Two begin, one ends; one begins, three end. InfLoRA's bases of the inputs are handed on, too."""
    method = {"codyra": runs.CODYRA, "inflora": InfLoRAConfig(rank=2, **runs.QUICK)}[kind]
    expected = runs.train(0, method)
    messages = in_processes(2, runs.train_and_stop, tmp_path / "a", runs.fail, (0, 1), method)
    assert messages == ["ValueError: a broken image"] * 2
    assert_same_end(tmp_path / "a", runs.resume(0, tmp_path / "a", method), expected)

    assert runs.train_and_stop(0, tmp_path / "b", runs.fail, (0,), method) == messages[0]
    found = in_processes(3, runs.resume, tmp_path / "b", method)
    runs.assert_same_bits(found)
    assert_same_end(tmp_path / "b", found[0], expected)
    (resumed,) = read_run(tmp_path / "b").manifest["resumes"]
    assert resumed == {"after_tasks": 1, "stopped": "stopped by an error (ValueError: a broken image)", "processes": 3}


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_stops_the_others(tmp_path, killed):
    """They say what happened; what was finished is whole, and goes on."""
    out = tmp_path / "run"
    found = started(2, runs.train_and_stop, out, runs.die, (killed,))()
    assert found[killed] == (None, "died")
    told, error = found[1 - killed]
    assert not error and told.startswith(LOST) and "The same command with --resume goes on" in told
    run = read_run(out)
    assert run.record.finished_tasks == 1
    assert run.status == ("running" if killed == 0 else "failed")
    assert_same_end(out, runs.resume(0, out), runs.train(0))


def test_an_error_of_one_process_stops_the_others(tmp_path):
    own, *others = in_processes(3, runs.train_and_stop, tmp_path / "run", runs.fail, (0,))
    assert own == "ValueError: a broken image" and all(other.startswith(LOST) for other in others)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["status"], manifest["error"], manifest["processes"]) == ("failed", own, 3)


def test_what_process_0_finds_wrong_all_refuse(tmp_path):
    """Another configuration, a directory that is taken: nothing changes there, and nobody waits for anybody."""
    out = tmp_path / "run"
    in_processes(2, runs.train_and_stop, out, runs.fail, (0, 1))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other = InfLoRAConfig(rank=2)
    for error, work, arguments in (
        ("another configuration: method was 'codyra' and is 'inflora' now", runs.resume, (out, other)),
        ("run exists already .a run, failed, 1 of 2 tasks", runs.train, (runs.CODYRA, out)),
    ):
        first, second = (told for _, told in started(2, work, *arguments)())
        with pytest.raises(AssertionError, match=error):
            raise AssertionError(first)
        assert "FirstFailed" in second and "FirstFailed" not in first
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    shutil.rmtree(out)
