"""What all benchmarks share: --small, the facts written beside every figure, interleaved ratios, and the goals' table."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import cost
import facts as measured_on
import pytest
import torch
from gpu import timing

_GOALS: list[tuple[str, float, float | None]] = []


def pytest_addoption(parser):
    parser.addoption("--goals", type=Path, metavar="FILE", help="add the goals' table to this JSON file")
    parser.addoption("--small", action="store_true", help="run every benchmark on tiny shapes, to see that it runs")


def pytest_configure(config):
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def facts() -> dict[str, str]:
    """Device, versions and commit."""
    return measured_on.facts()


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


@pytest.fixture
def small(request) -> bool:
    return request.config.getoption("--small")


@pytest.fixture
def threads():
    """threads(count): for the rest of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def ratio(small) -> Callable[..., float]:
    """ratio(ours, rival): time of ours over rival's, in turn; the median over blocks of the ratio of minima.

    Process time, which others on the machine disturb least, or another clock: that of several threads adds theirs up.
    """

    def measure(
        ours: Callable[[], object], rival: Callable[[], object], clock: Callable[[], float] = time.process_time
    ) -> float:
        blocks, rounds = (1, 2) if small else (7, 8)
        found = (cost.fastest({"ours": ours, "rival": rival}, 0.0, rounds, clock) for _ in range(blocks))
        return median(best["ours"] / best["rival"] for best in found)

    return measure


@pytest.fixture
def goal(small) -> Callable[..., None]:
    """goal(name, measured, target=None): a line of the table at the end. Nothing fails: a figure is a result."""

    def note(name: str, measured: float, target: float | None = None) -> None:
        if not small:
            _GOALS.append((name, measured, target))

    return note


def pytest_terminal_summary(terminalreporter, config):
    if not _GOALS:
        return
    if config.getoption("--goals"):
        measured_on.save_goals(config.getoption("--goals"), _GOALS)
    terminalreporter.section("goals")
    for name, measured, target in _GOALS:
        verdict = ""
        if target is not None:
            verdict = f"   target <= {target:<6g} {'reached' if measured <= target else 'missed'}"
        terminalreporter.write_line(f"{name:<58} measured {measured:7.4f}{verdict}")
