"""docs/faults.md is what was found out, of the cases that there are."""

import json

import fault_suite
import pytest

pytest.importorskip("open_clip")
pytest.importorskip("scipy")

from faults.case import CASES, VERDICTS  # noqa: E402
from faults.planted import BUGS  # noqa: E402

RESULT = json.loads(fault_suite.RESULT.read_text())


def test_the_page_shows_what_was_found_out():
    assert fault_suite.PAGE.read_text() == fault_suite.page(RESULT)


def test_every_case_was_run_as_it_is_with_its_full_count():
    assert list(RESULT["cases"]) == [case.name for group in fault_suite.in_groups().values() for case in group]
    for name, found in RESULT["cases"].items():
        case = CASES[name]
        assert (found["group"], found["what"], found["must"], found["count"]) == (
            case.group, case.what, case.must, case.many
        )  # fmt: skip
        assert (found["peft"] is None) == (case.theirs is None)
        assert {found["ours"]["verdict"]} | {(found["peft"] or found["ours"])["verdict"]} <= set(VERDICTS)
    assert {what: bug["case"] for what, bug in RESULT["planted"].items()} == {bug.what: bug.case for bug in BUGS}


def test_what_is_claimed():
    assert {case["ours"]["verdict"] for case in RESULT["cases"].values()} == {"survived"}
    assert all(bug["verdict"] != "survived" for bug in RESULT["planted"].values())
    for name, least in {
        "killed_while_training": 200, "stopped_at_a_random_step": 20, "flipped_bit_in_an_adapter_file": 1000,
        "flipped_bit_in_a_journal": 1000, "flipped_bit_in_a_commit_point": 1000, "same_bits_in_every_run": 100,
        "merges_beside_guard_pages": 1000, "readers_of_mutated_files": 10_000,
    }.items():  # fmt: skip
        assert RESULT["cases"][name]["count"] >= least, name


def test_a_verdict_short_of_survived_shows_in_every_place():
    changed = json.loads(json.dumps(RESULT))
    changed["cases"]["disk_full"]["ours"] = {"verdict": "half done", "seen": "a | b", "counts": {}}
    shown = fault_suite.page(changed)
    total = len(RESULT["cases"])
    assert f"**{total - 1} of {total} faults survived.**" in shown and "**half done**: a \\| b" in shown


def test_a_case_is_run_and_told(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["fault_suite.py", "--only", "rank_that_is_none"])
    before = fault_suite.RESULT.read_bytes()
    monkeypatch.setitem(__import__("sys").modules, "peft", __import__("types"))  # its import takes ten seconds
    monkeypatch.setitem(__import__("sys").modules, "peft.tuners", __import__("types"))
    monkeypatch.setitem(__import__("sys").modules, "peft.tuners.lora", __import__("types"))
    monkeypatch.setattr(CASES["rank_that_is_none"], "theirs", None)
    fault_suite.main()
    assert "rank_that_is_none: survived" in capsys.readouterr().out and fault_suite.RESULT.read_bytes() == before
