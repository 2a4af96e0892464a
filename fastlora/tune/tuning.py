"""Measuring calls, and merging what is fastest into the user's dispatch table."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

import fastlora
from fastlora.files import write_atomically
from fastlora.ops import dispatch
from fastlora.ops.backend import interpreting, why_not_triton
from fastlora.ops.dispatch_table import ROLES, Entry, Key, TableError, format_table, read_table
from fastlora.tune.calls import Call
from fastlora.tune.candidates import Candidate, Check, Operands, default_candidates, make_run
from fastlora.tune.clock import Timer, interleaved
from fastlora.tune.report import Outcome, Trial, TuneReport


def tune(
    calls: Iterable[Call],
    device: torch.device | str | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    budget_seconds: float = 60.0,
    candidates: Sequence[Candidate] | None = None,
    timer: Timer = interleaved,
    progress: Callable[[str], None] | None = None,
) -> TuneReport:
    """Measure every call forward and for the gradient of x, and write what is fastest to the user's table.

    A candidate is timed only after its result was found as exact as PyTorch's. What the table holds for other keys
    stays. Calls that share a key are measured once, at the most rows.

    Args:
        calls: as `calls_of` finds them.
        device: a CUDA or ROCm device; by default the current one.
        out: the table to write; by default the one that is read ($FASTLORA_TABLE, else in the user's cache).
        budget_seconds: when it is spent, compilation included, the rest is left unmeasured; largest calls first.
        candidates: what to try; by default the library, and all variants and tiles for the device.
        timer: replaces the clock, for tests.
        progress: called with a line before each measurement.
    Returns:
        TuneReport; str() is a table.
    Raises:
        RuntimeError: the machine has neither a CUDA or ROCm device nor Triton's interpreter.
        OSError: `out` cannot be written.
    """
    device = check_device(device)
    path = Path(out) if out is not None else dispatch.user_table_path()
    # a path that will not do is found before minutes of work, not after
    path.parent.mkdir(parents=True, exist_ok=True)
    _held(path)
    name = dispatch.device_name(device)
    deadline = time.monotonic() + budget_seconds
    outcomes = []
    for key, (role, call) in _by_key(calls, name).items():
        if progress:
            progress(f"{role} M {call.m} N {call.n} K {call.k} R {call.r} {key.dtype}")
        outcomes.append(_measure(key, role, call, device, candidates, timer, deadline))
    report = TuneReport(name, path, tuple(outcomes))
    return _write(report) if report.entries else report


def check_device(device: torch.device | str | None) -> torch.device:
    """The device to measure on.

    Raises:
        RuntimeError: it is none for the kernels.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device() if chosen.index is None else chosen.index)
    if chosen.type == "cpu" and interpreting():
        return chosen
    there = "torch sees none here" if not torch.cuda.is_available() else f"{chosen} is none"
    raise RuntimeError(
        f"the dispatch tables are for CUDA and ROCm devices, and {there}; on a CPU the torch backend has nothing to choose."
    )


def _by_key(calls: Iterable[Call], device: str) -> dict[Key, tuple[str, Call]]:
    """The call to measure for every key, both roles of the largest first."""
    found: dict[Key, tuple[str, Call]] = {}
    for call in sorted(calls, key=lambda c: c.m * c.n * c.k, reverse=True):
        for role in ROLES:
            key = dispatch.table_key(role, device, call.m, call.n, call.k, call.r, call.dtype, call.ranks)
            found.setdefault(key, (role, call))
    return found


def _measure(
    key: Key,
    role: str,
    call: Call,
    device: torch.device,
    candidates: Sequence[Candidate] | None,
    timer: Timer,
    deadline: float,
) -> Outcome:
    obstacle = why_not_triton(device, call.dtype, (call.r,))
    if obstacle or call.r == 0 or call.m == 0:
        return Outcome(key, (), reason=obstacle or "nothing to choose without rows or ranks")
    if time.monotonic() > deadline:
        return Outcome(key, (), reason="the budget was spent before")
    from fastlora.triton_kernels.common import on_device

    with torch.no_grad():
        try:
            operands = Operands(call, device)
            check = Check(role, operands)
        except RuntimeError as error:  # out of memory, mostly
            return Outcome(key, (), reason=_told(error))
    with torch.no_grad(), on_device(operands.x):
        found = candidates if candidates is not None else default_candidates(call, role, device)
        trials: list[Trial] = []
        for candidate in found:
            if time.monotonic() > deadline:
                # what is only half measured is no ground for an entry
                reason = f"the budget was spent after {len(trials)} of {len(found)} candidates"
                return Outcome(key, tuple(trials), reason=reason)
            trials.append(_try(candidate, role, operands, check))
        runs = {i: make_run(t.candidate, role, operands) for i, t in enumerate(trials) if not t.reason}
        if not runs:
            return Outcome(key, tuple(trials), reason="no candidate could be measured")
        try:
            times = timer(list(runs.values()))
        except Exception as error:  # whatever a driver or compiler raises; the report carries it
            return Outcome(key, tuple(trials), reason=_told(error))
    timed = dict(zip(runs, times))
    for index, time_us in timed.items():
        trials[index] = replace(trials[index], time_us=time_us)
    best = trials[min(timed, key=timed.__getitem__)]
    measured = f"measured on {key.device}, fastest of {len(runs)} candidates, {_circumstances(operands.x)}"
    tile = best.candidate.tile
    fields = None if tile is None else asdict(replace(tile, tuned_on=key.device))
    # four digits: what follows is noise
    entry = Entry(role, best.candidate.variant, fields, measured, float(f"{best.time_us:.4g}"))
    return Outcome(key, tuple(trials), entry)


def _try(candidate: Candidate, role: str, operands: Operands, check: Check) -> Trial:
    """Compile, run and check one candidate."""
    try:
        wrong = check.why_wrong(make_run(candidate, role, operands)())
    except Exception as error:  # whatever a driver or compiler raises; the report carries it
        wrong = _told(error)
    return Trial(candidate, reason=wrong or "")


def _told(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:200]}"


def _circumstances(x: Tensor) -> str:
    """Versions and date, and how float32 is multiplied where that is a choice."""
    from fastlora.triton_kernels.common import compute_type

    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    triton, date = importlib.metadata.version("triton"), datetime.date.today().isoformat()
    dots = f", float32 as {compute_type(x)}" if x.dtype == torch.float32 else ""
    return f"torch {torch.__version__}, {runtime}, triton {triton}, fastlora {fastlora.__version__}{_commit()}{dots}, {date}"


@functools.cache
def _commit() -> str:
    """The commit of a source checkout, in parentheses; nothing where fastlora is installed."""
    root = Path(fastlora.__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
        return f" ({subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()})"
    except (OSError, subprocess.SubprocessError):
        return ""


def _held(path: Path) -> tuple[dict[Key, Entry], str]:
    """The table at `path`, and the reason that what lies there is none."""
    try:
        return read_table(path, ""), ""
    except FileNotFoundError:
        return {}, ""
    except TableError as error:
        return {}, str(error)


def _write(report: TuneReport) -> TuneReport:
    """Merge into the table at the report's path; what cannot be read there is replaced."""
    kept, replaced = _held(report.path)
    write_atomically(report.path, format_table(kept | report.entries))
    dispatch.reload()
    return replace(report, replaced=replaced)
