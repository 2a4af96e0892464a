"""What a fault is: what is done, what must happen, and a process of its own in which it is found out."""

from __future__ import annotations

import contextlib
import faulthandler
import inspect
import os
import pickle
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# from best to worst; "warned" is harm that a warning told of, "half done" an error that left something changed
VERDICTS = ("survived", "unclear error", "warned", "half done", "silent harm", "crash")
CASES: dict[str, Case] = {}


@dataclass(frozen=True)
class Outcome:
    """What a fault did. seen: in words; counts: figures by what they count."""

    verdict: str
    seen: str
    counts: dict[str, float] = field(default_factory=dict)


@dataclass
class Case:
    """One fault.

    Args:
        group: of the table.
        name: of the function.
        what: is done, the docstring of the function.
        must: happen.
        run: finds out. It may ask by name for `folder`, an empty directory, and `count`, how often.
        few, many: `count` in the test suite and for the published table.
        theirs: the same fault against PEFT; None where PEFT has nothing of the kind.
    """

    group: str
    name: str
    what: str
    must: str
    run: Callable[..., Outcome]
    few: int = 1
    many: int = 1
    theirs: Callable[..., Outcome] | None = None

    def peft(self, run: Callable[..., Outcome]) -> Callable[..., Outcome]:
        """Decorates the same fault against PEFT."""
        self.theirs = run
        return run

    def outcome(self, count: int | None = None, within: Callable[[], Any] = nullcontext) -> Outcome:
        """What it does. within: makes a context in the process that finds out, for bugs that are planted there."""
        return _found_out(self.run, self.few if count is None else count, within)

    def outcome_of_peft(self, count: int | None = None) -> Outcome:
        assert self.theirs is not None
        return _found_out(self.theirs, self.few if count is None else count, nullcontext)


def group(title: str) -> Callable[..., Callable[[Callable[..., Outcome]], Case]]:
    """Decorator of the cases of a group: fault(must, few=, many=)."""

    def fault(must: str, *, few: int = 1, many: int = 1) -> Callable[[Callable[..., Outcome]], Case]:
        def register(run: Callable[..., Outcome]) -> Case:
            assert run.__name__ not in CASES and run.__doc__, f"{run.__name__} needs a name and a docstring of its own"
            case = Case(title, run.__name__, " ".join(run.__doc__.split()), must, run, few, many)
            CASES[case.name] = case
            return case

        return register

    return fault


def _found_out(run: Callable[..., Outcome], count: int, within: Callable[[], Any]) -> Outcome:
    folder = Path(tempfile.mkdtemp(prefix="fault-"))
    os.chmod(folder, 0o755)  # some cases go on as another user
    known = {"folder": folder, "count": count}
    given = {name: known[name] for name in inspect.signature(run).parameters}

    def work() -> Outcome:
        torch.manual_seed(0)
        random.seed(0)
        with within():
            outcome = run(**given)
        return Outcome(outcome.verdict, outcome.seen.replace(str(folder), "…"), outcome.counts)

    try:
        ended, result = in_child(work, seconds=120 + count)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if ended:
        return Outcome("crash", ended)
    if isinstance(result, str):
        raise RuntimeError(f"{run.__module__}.{run.__name__} is broken: it could not find anything out.\n{result}")
    return result


def in_child(work: Callable[[], Any], seconds: float) -> tuple[str, Any]:
    """Run `work` in a process of its own, which may die.

    Returns:
        ("", what it returned, or a traceback as a str); or how the process died, and None.
    """
    return in_children([work], seconds)[0]


def in_children(works: Sequence[Callable[[], Any]], seconds: float) -> list[tuple[str, Any]]:
    """`in_child` for several at the same time."""
    children = [_Child(work) for work in works]
    deadline = time.monotonic() + seconds
    try:
        while any([child.running() for child in children]) and time.monotonic() < deadline:
            time.sleep(0.001)
        return [child.result(seconds) for child in children]
    finally:
        for child in children:
            child.end()


class _Child:
    """A process at work. What it returns is read while it works, since a pipe holds little."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._read, write = os.pipe()
        self._pid, self._status, self._found = os.fork(), None, bytearray()
        if self._pid == 0:
            _work_and_exit(work, self._read, write)
        os.close(write)
        os.set_blocking(self._read, False)

    def running(self) -> bool:
        if self._status is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self._status = status if pid else None
            with contextlib.suppress(BlockingIOError):
                while part := os.read(self._read, 1 << 20):
                    self._found += part
        return self._status is None

    def result(self, seconds: float) -> tuple[str, Any]:
        if self._status is None:
            return f"still at work after {seconds:.0f} s", None
        code = os.waitstatus_to_exitcode(self._status)
        if code or not self._found:
            return (f"killed by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"), None
        return "", pickle.loads(self._found)

    def end(self) -> None:
        """The process and whatever it has started."""
        os.close(self._read)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        if self._status is None:
            os.waitpid(self._pid, 0)


def _work_and_exit(work: Callable[[], Any], read: int, write: int) -> None:
    """In the child, which never comes back from here."""
    os.close(read)
    os.setpgid(0, 0)  # what it starts goes with it
    faulthandler.disable()  # pytest's has a copy of stderr, and what dies of a planted bug is to die quietly
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silence, stream)
    try:
        result = work()
    except BaseException:
        result = traceback.format_exc()
    try:
        with os.fdopen(write, "wb") as file:
            pickle.dump(result, file)
    finally:
        os._exit(0)
