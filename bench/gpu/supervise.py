"""Runs the process that measures, and starts it again where it died or hangs: a kernel that never ends, an access that
breaks the device's context and an abort in a compiler cost one part, or one variant, and not the run.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from gpu.state import State

POLL_SECONDS = 0.2
# what is written and printed after the last figure
GRACE_SECONDS = 10.0
MAX_STARTS = 12
# the first import of torch on a machine just started
START_SECONDS = 120.0


def supervise(path: Path, names: Sequence[str], command: Callable[[], list[str]], deadline: float) -> None:
    """Until every part is done, failed or skipped. deadline: epoch seconds. command: starts the process that measures."""
    for _ in range(MAX_STARTS):
        if not _open_parts(path, names):
            return
        if time.time() > deadline:
            break
        process = subprocess.Popen(command(), stdin=subprocess.DEVNULL)
        reason = _watch(process, path, deadline)
        _record(path, names, reason or (f"the process exited with {process.returncode}" if process.returncode else ""))
    state = State.load(path)
    for name in _open_parts(path, names):
        late = time.time() > deadline
        state.finish(name, "skipped", reason="skipped: budget" if late else f"after {MAX_STARTS} starts")


def _open_parts(path: Path, names: Sequence[str]) -> list[str]:
    state = State.load(path)
    return [name for name in names if state.part(name)["status"] not in ("done", "failed", "skipped")]


def _watch(process: subprocess.Popen, path: Path, deadline: float) -> str | None:
    """Wait for the process; kill it where one item takes too long, and say so."""
    started = time.time()
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        reason = _overdue(State.load(path), started, deadline)
        if reason:
            process.kill()
            process.wait()
            return reason
    return None


def _overdue(state: State, started: float, deadline: float) -> str | None:
    now = time.time()
    if now > deadline + GRACE_SECONDS:
        return "the budget is spent"
    running = [part for part in state.data["parts"].values() if part["status"] == "running"]
    last_sign = max(started, state.path.stat().st_mtime)
    until = running[0].get("item_until") if running else last_sign + START_SECONDS
    if now > until:
        return f"killed: {running[0].get('item')} did not end" if running else "killed: no part began"
    return None


def _record(path: Path, names: Sequence[str], reason: str) -> None:
    """The part that ran: measured again without the variant it was at, or failed where it was at none."""
    state = State.load(path)
    running = [name for name in names if state.part(name)["status"] == "running"]
    if not running and reason:  # it died before or between parts: the next one is not tried for ever
        running = [name for name in names if state.part(name)["status"] == "pending"][:1]
    for name in running:
        part = state.part(name)
        item, error = part.get("item") or "", part.pop("error", None) or reason
        if reason == "the budget is spent":
            state.finish(name, "skipped", reason="skipped: budget, with what it has")
        elif item.startswith("ours ") and item not in state.data["excluded"]:
            state.data["excluded"][item] = f"in part {name}: {error}"
            part["status"] = "pending"
        else:
            state.finish(name, "failed", error=f"{error} (at {item or 'its start'})")
    state.save()
