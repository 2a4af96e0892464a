"""One optimizer step over every adapter of ViT-B/16 with the proximal step on its gates, and C4 against its target.

    pytest bench/bench_optim.py             432 tensors, 4.43 M parameters, rank 16, in float32
    pytest bench/bench_optim.py --small     12 tiny modules

Rivals: AdamW foreach and the released code's loop over the gates; AdamW fused and a foreach prox. Ours is checked
against torch's AdamW and the exact operator before it is timed. On a CPU: one thread, and two. For ratios on a GPU,
launched and replayed as a CUDA graph, see gpu_suite.py, part optimizer (G9).
"""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
from gpu import whole
from rivals.optimizers import OPTIMIZERS

from fastlora.build import extension
from fastlora.optim import ProxAdamW

# goal C4: ours against AdamW foreach with the released prox
C4_TARGET = 0.16
CUDA = torch.cuda.is_available()
BYTES = 28  # a parameter: p, m and v read and written, g read


@pytest.fixture(scope="module")
def place(request):
    """What the makers of gpu/whole.py ask of a run."""
    device = torch.device("cuda" if CUDA else "cpu")
    found = SimpleNamespace(small=request.config.getoption("--small"), device=device)
    whole.check_optimizers(found)
    return found


def elements(place) -> int:
    r = 4 if place.small else 16
    return sum(r * (n + k + 1) for n, k in whole.modules(place.small))


@pytest.mark.parametrize("rival", OPTIMIZERS)
def test_step(benchmark, facts, limits, place, rival):
    step = whole.make_step(place, OPTIMIZERS[rival], False)
    count = elements(place)
    benchmark.group = f"optimizer step, {count} parameters"
    benchmark.extra_info.update(facts, dtype="float32", shape=f"{count} parameters", bytes=BYTES * count)
    benchmark((lambda: (step(), torch.cuda.synchronize())) if CUDA else step)
    if benchmark.stats:
        gbs = BYTES * count / benchmark.stats.stats.median / 1e9
        benchmark.extra_info.update(gbs=gbs, share_of_limit=gbs * 1e9 / limits.bytes)


@pytest.mark.skipif(CUDA, reason="C4 is a goal of the CPU")
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("rival", "target"), [("as released", C4_TARGET), ("fused AdamW + foreach prox", None)])
def test_c4(ratio, goal, place, threads, rival, target, count):
    if extension() is None:
        pytest.skip("the extension was not built, so that the step is torch's")
    threads(count)
    ours = whole.make_step(place, OPTIMIZERS["ProxAdamW"], False)
    theirs = whole.make_step(place, OPTIMIZERS[rival], False)
    clock = time.process_time if count == 1 else time.perf_counter
    name = f"{'C4' if target else '  '} optimizer + prox / {rival}, threads: {count}"
    goal(name, ratio(ours, theirs, clock), target)


@pytest.mark.skipif(CUDA, reason="host time on a GPU: see gpu_suite.py")
def test_a_table_that_is_written_again_at_every_step(ratio, goal, place):
    """Gradients that lie elsewhere each time, against gradients that stay."""
    moving, staying = ([torch.nn.Parameter(torch.randn(s)) for s in shapes(place)] for _ in range(2))
    steps = [ProxAdamW([{"params": each, "prox": True}], lr=1e-3).step for each in (moving, staying)]
    two = [[torch.randn_like(p) for p in moving] for _ in range(2)]
    for p in staying:
        p.grad = torch.randn_like(p)
    turn = [0]

    def move() -> None:
        turn[0] += 1
        for p, g in zip(moving, two[turn[0] % 2]):
            p.grad = g
        steps[0]()

    goal("   gradients that move / that stay", ratio(move, steps[1]))


def shapes(place):
    r = 4 if place.small else 16
    return [shape for n, k in whole.modules(place.small) for shape in ((r, k), (n, r), (r,))]
