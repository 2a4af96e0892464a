"""Every fault must be survived; every planted bug must be found by the case that is there for it."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("scipy")
if not hasattr(os, "fork"):
    pytest.skip("needs fork, to outlive what it does", allow_module_level=True)

from faults import case as module  # noqa: E402
from faults.case import CASES, Case, Outcome  # noqa: E402
from faults.every import in_groups  # noqa: E402
from faults.judge import refused, right, worst  # noqa: E402
from faults.planted import BUGS  # noqa: E402


@pytest.mark.parametrize("name", CASES)
def test_fault(name):
    outcome = CASES[name].outcome()
    assert outcome.verdict == "survived", f"{CASES[name].what} must end in {CASES[name].must}: {outcome}"


@pytest.mark.parametrize("bug", BUGS, ids=[bug.what.replace(" ", "-") for bug in BUGS])
def test_planted_bug(bug):
    outcome = CASES[bug.case].outcome(bug.count, bug.plant)
    assert outcome.verdict != "survived", f"{bug.what}, and {bug.case} has not noticed"


def test_there_are_enough_of_each_group():
    assert len(CASES) >= 70 and all(len(cases) >= 15 for cases in in_groups().values())
    assert sum(len(cases) for cases in in_groups().values()) == len(CASES)
    assert len(BUGS) >= 20


# ---- the machinery: what a case says must be what happened


def outcome_of(run):
    run.__doc__ = "A fault."
    return Case("group", run.__name__, "A fault.", "an error", run).outcome()


def test_a_process_that_dies_is_a_crash():
    assert outcome_of(lambda: os.kill(os.getpid(), 9)) == Outcome("crash", "killed by SIGKILL")
    assert outcome_of(lambda: os._exit(3)) == Outcome("crash", "left with exit code 3")


def test_a_process_that_hangs_is_a_crash(monkeypatch):
    died, result = module.in_child(lambda: __import__("time").sleep(60), seconds=0.2)
    assert (died, result) == ("still at work after 0 s", None)


def test_a_case_that_is_itself_broken_is_no_outcome():
    with pytest.raises(RuntimeError, match="is broken(.|\n)*ZeroDivisionError"):
        outcome_of(lambda: 1 / 0)


def test_verdicts(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")

    def fails(message="x is 3; give 4", kind=ValueError, changes=False):
        def work():
            if changes:
                path.write_text("after")
            raise kind(message)

        return work

    def warns():
        __import__("warnings").warn("x is 3", stacklevel=2)

    assert refused(fails(), "x is 3", keeps=[path]).verdict == "survived"
    assert refused(fails("oh no"), "x is 3", keeps=[path]).verdict == "unclear error"
    assert refused(fails(kind=KeyError), "x is 3", keeps=[path]).verdict == "unclear error"
    assert refused(fails(changes=True), "x is 3", keeps=[path]).verdict == "half done"
    assert refused(lambda: None, "x is 3").verdict == "silent harm"
    assert refused(warns, "x is 3").verdict == "warned" and refused(warns, "y").verdict == "silent harm"
    three = worst([right(True, ""), right(False, "wrong"), refused(fails(), "x is 4")])
    assert three == Outcome("silent harm", "wrong", {"tried": 3, "survived": 1})
