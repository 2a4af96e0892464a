"""What all benchmarks share: --small, the facts written beside every figure, interleaved ratios, and the goals' table."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pytest
import torch
from gpu import timing

_GOALS: list[tuple[str, float, float | None]] = []


def pytest_addoption(parser):
    parser.addoption("--small", action="store_true", help="run every benchmark on tiny shapes, to see that it runs")


def pytest_configure(config):
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def facts() -> dict[str, str]:
    """Device, versions and commit."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
        "driver": _driver() if torch.cuda.is_available() else "none",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split("\n")[0] or "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


class Limits(NamedTuple):
    """What the device can do, a second: operations of a large product, bytes read and written by a large copy."""

    flops: float
    bytes: float


@pytest.fixture(scope="session")
def limits(request) -> Limits:
    """Measured once, in the dtype that the benchmarks use on this device."""
    cuda, small = torch.cuda.is_available(), request.config.getoption("--small")
    device, dtype = (torch.device("cuda"), torch.bfloat16) if cuda else (torch.device("cpu"), torch.float32)
    side, count = (64, 1 << 12) if small else (8192, 1 << 30) if cuda else (1024, 1 << 26)
    matrix, source = torch.randn(side, side, device=device).to(dtype), torch.randn(count, device=device)
    target = torch.empty_like(source)
    calls = {"product": lambda i: torch.mm(matrix, matrix), "copy": lambda i: target.copy_(source)}
    series = timing.interleaved(calls, device, 1)
    product, copy = (series[name].median / 1e6 for name in calls)
    return Limits(2 * side**3 / product, 8 * count / copy)


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


@pytest.fixture
def small(request) -> bool:
    return request.config.getoption("--small")


@pytest.fixture
def ratio(small) -> Callable[..., float]:
    """ratio(ours, rival): time of ours over rival's, in turn; the median over blocks of the ratio of minima.

    Process time, which others on the machine disturb least, or another clock: that of several threads adds theirs up.
    """

    def measure(
        ours: Callable[[], object], rival: Callable[[], object], clock: Callable[[], float] = time.process_time
    ) -> float:
        blocks, rounds = (1, 2) if small else (7, 8)
        return median(_block(ours, rival, rounds, clock) for _ in range(blocks))

    return measure


def _block(ours: Callable[[], object], rival: Callable[[], object], rounds: int, clock: Callable[[], float]) -> float:
    best = {ours: float("inf"), rival: float("inf")}
    for _ in range(rounds):
        for call in (ours, rival):
            start = clock()
            call()
            best[call] = min(best[call], clock() - start)
    return best[ours] / best[rival]


@pytest.fixture
def goal(small) -> Callable[..., None]:
    """goal(name, measured, target=None): a line of the table at the end. Nothing fails: a figure is a result."""

    def note(name: str, measured: float, target: float | None = None) -> None:
        if not small:
            _GOALS.append((name, measured, target))

    return note


def pytest_terminal_summary(terminalreporter):
    if not _GOALS:
        return
    terminalreporter.section("goals")
    for name, measured, target in _GOALS:
        verdict = ""
        if target is not None:
            verdict = f"   target <= {target:<6g} {'reached' if measured <= target else 'missed'}"
        terminalreporter.write_line(f"{name:<58} measured {measured:7.4f}{verdict}")
