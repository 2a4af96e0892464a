"""The clock of `fastlora.tune`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Tensor]
# median microseconds of each run
Timer = Callable[[Sequence[Run]], list[float]]

# runs of one candidate in one captured graph: a single short kernel is over before the clock's events are
RUNS_A_GRAPH = 10
MIN_ROUNDS, MAX_ROUNDS, SECONDS = 5, 20, 1.0


def interleaved(runs: Sequence[Run]) -> list[float]:
    """Median microseconds of each run; the runs take turns, so that a change of clocks meets all of them.

    On a GPU a run is captured in a CUDA graph and the time is the device's: what Python takes to launch is left out.
    """
    # each run once before the clock starts; all of them are on one device
    on_gpu = [run().is_cuda for run in runs]
    pool = torch.cuda.graph_pool_handle() if any(on_gpu) else None
    samplers = [_graph_sampler(run, pool) if gpu else _host_sampler(run) for run, gpu in zip(runs, on_gpu)]
    samples: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + SECONDS
    for turn in range(MAX_ROUNDS):
        if turn >= MIN_ROUNDS and time.perf_counter() > end:
            break
        for sampler, taken in zip(samplers, samples):
            taken.append(sampler())
    return [statistics.median(taken) for taken in samples]


def _host_sampler(run: Run) -> Callable[[], float]:
    def sample() -> float:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e6

    return sample


def _graph_sampler(run: Run, pool: Any) -> Callable[[], float]:
    # one pool for all graphs: nobody reads their outputs, so they may share the memory
    graph, start, end = torch.cuda.CUDAGraph(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.graph(graph, pool=pool):
        for _ in range(RUNS_A_GRAPH):
            run()
    graph.replay()

    def sample() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / RUNS_A_GRAPH

    return sample
