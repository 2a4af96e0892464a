"""Interleaved times of rivals in one process: launched eagerly, and replayed as a CUDA graph.

A sample is the time between two device events around several calls, over the number of calls; the calls rotate through
enough inputs to leave the L2 behind. All rivals give one sample a round, queued without waiting in between, so that a
change of clocks meets all of them; a ratio is the median over rounds of the ratio of samples. Eager samples hold what
the host takes to launch wherever that is more than the device takes. On a CPU a sample is process time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[int], Any]
SAMPLE_US = 600.0
MAX_CALLS = 48
MIN_ROUNDS, MAX_ROUNDS = 7, 25
# on a CPU the suite shows that it runs
CPU_ROUNDS = 2


@dataclass
class Series:
    """Samples in microseconds, one a round; or the reason that there are none."""

    samples: list[float]
    reason: str = ""

    @property
    def median(self) -> float | None:
        return statistics.median(self.samples) if self.samples else None

    def summary(self) -> dict[str, Any]:
        return _quartiles(self.samples) if self.samples else {"median": None, "reason": self.reason}

    def over(self, base: Series) -> dict[str, Any]:
        """Ratio to another series of the same rounds."""
        if not self.samples or not base.samples:
            return {"median": None, "reason": self.reason or base.reason}
        return _quartiles([mine / its for mine, its in zip(self.samples, base.samples)])


def _quartiles(values: Sequence[float]) -> dict[str, float]:
    if len(values) < 2:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def rotations_for(device: torch.device, set_bytes: int) -> int:
    """How many equal inputs pass three times the L2 in one turn; 2 to 12."""
    if device.type != "cuda":
        return 1
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(2, -(-3 * l2 // max(set_bytes, 1))), 12)


def interleaved(
    calls: dict[str, Call],
    device: torch.device,
    rotations: int,
    *,
    seconds: float = 0.5,
    graph: bool = False,
    uncapturable: Mapping[str, str] | None = None,
    begin: Callable[[str], None] | None = None,
) -> dict[str, Series]:
    """Time every call(i), i the number of its input. A call that cannot be captured has a reason and no samples.

    Args:
        uncapturable: name -> why no capture is tried.
        begin: told the name of each call before its first run and its capture.
    """
    samplers: dict[str, Callable[[], Callable[[], float]]] = {}
    failed = {name: Series([], f"no CUDA graph: {why}") for name, why in (uncapturable or {}).items() if graph}
    for name, call in calls.items():
        if name in failed:
            continue
        if begin is not None:
            begin(name)
        try:
            samplers[name] = _sampler(call, device, rotations, graph)
        except Exception as error:  # capture refuses in many ways; the report carries the text
            if device.type == "cuda":
                _recover(device)
            lines = str(error).strip().splitlines() or [""]
            what = "no CUDA graph" if graph else "failed"
            failed[name] = Series([], f"{what}: {type(error).__name__}: {lines[0][:200]}")
    return {**_rounds(samplers, device, seconds), **failed}


def _recover(device: torch.device) -> None:
    """After a capture that failed: it leaves the default generator in the state of a capture, and random numbers raise.

    Raises:
        RuntimeError: the device is lost, which is no matter of capture.
    """
    torch.cuda.synchronize(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    fresh = torch.Generator(device).manual_seed(0)
    torch.cuda.default_generators[index].graphsafe_set_state(fresh.graphsafe_get_state())


def _rounds(samplers: dict[str, Any], device: torch.device, seconds: float) -> dict[str, Series]:
    taken: dict[str, list[float]] = {name: [] for name in samplers}
    end = time.perf_counter() + seconds
    least, most = (MIN_ROUNDS, MAX_ROUNDS) if device.type == "cuda" else (CPU_ROUNDS, CPU_ROUNDS)
    for turn in range(most):
        if turn >= least and time.perf_counter() > end:
            break
        order = list(samplers)
        # every rival is first in its turn, since the first of a round finds the device idle
        order = order[turn % len(order) :] + order[: turn % len(order)] if order else order
        if device.type == "cuda" and order:
            samplers[order[0]]()  # not read: it fills the queue
        read = [(name, samplers[name]()) for name in order]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        for name, value in read:
            taken[name].append(value())
    return {name: Series(values) for name, values in taken.items()}


def _sampler(call: Call, device: torch.device, rotations: int, graph: bool) -> Callable[[], Callable[[], float]]:
    if device.type != "cuda":
        if graph:
            raise RuntimeError("a CPU has no CUDA graphs")
        return _host_sampler(call, rotations)
    for i in range(max(rotations, 3)):
        call(i % rotations)
    torch.cuda.synchronize(device)
    count = _calls_a_sample(call, device, rotations)
    run = _capture(call, rotations, count) if graph else lambda: [call(i % rotations) for i in range(count)]

    def sample() -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        return lambda: start.elapsed_time(end) * 1e3 / count

    return sample


def _host_sampler(call: Call, rotations: int) -> Callable[[], Callable[[], float]]:
    call(0)

    def sample() -> Callable[[], float]:
        start = time.process_time()
        for i in range(rotations):
            call(i)
        value = (time.process_time() - start) * 1e6 / rotations
        return lambda: value

    return sample


def _calls_a_sample(call: Call, device: torch.device, rotations: int) -> int:
    """Whole turns through the inputs, about SAMPLE_US long."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for i in range(rotations):
        call(i)
    end.record()
    torch.cuda.synchronize(device)
    turn_us = max(start.elapsed_time(end) * 1e3, 1.0)
    turns = max(1, min(round(SAMPLE_US / turn_us), MAX_CALLS // rotations))
    return turns * rotations


def _capture(call: Call, rotations: int, count: int) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as torch asks for: work before a capture on a stream that is not the default one
        for i in range(min(rotations, 2)):
            call(i)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            call(i % rotations)
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def device_profile(call: Callable[[], Any], device: torch.device, calls: int = 5) -> dict[str, Any]:
    """Kernel time in microseconds and launches of one call, as the profiler sees them; null with a reason on a CPU."""
    if device.type != "cuda":
        return {"kernel_us": None, "launches": None, "reason": "a CPU launches no kernels"}
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(calls):
            call()
        torch.cuda.synchronize(device)
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    # ranges that torch marks, such as an optimizer's step, span kernels that are counted themselves
    events = [event for event in events if not getattr(event, "is_user_annotation", False)]
    total = sum(event.time_range.elapsed_us() for event in events)
    return {"kernel_us": total / calls, "launches": len(events) / calls, "names": _names(events)}


def _names(events: Sequence[Any]) -> list[str]:
    return sorted({event.name[:80] for event in events})[:12]
