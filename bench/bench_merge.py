"""C3: merging all modules of ViT-B/16 on the CPU, against what one would write in PyTorch.

    pytest bench/bench_merge.py

The best of three loops is the rival of the ratios; each is checked against the definition in float64 before it is timed.
"""

from __future__ import annotations

import time

import cost
import pytest
import torch
from merge_model import make_set, ours, torch_loops
from shapes import module_shapes

from fastlora import reference

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
C3_TARGETS = {"fp16": 0.12, "bf16": 0.6}
# a thousand merges of so small an update leave every weight finite
UPDATE = 1e-6


def given(small: bool, name: str):
    shapes = module_shapes(1, (32,)) if small else module_shapes()
    return make_set(shapes, 4 if small else 16, DTYPES[name], UPDATE)


def check(call, fresh) -> None:
    """Every weight as the definition says, to one rounding of its dtype and one of the update's."""
    before = [weight.clone() for weight in fresh.weights[:6]]
    call()
    for got, weight, *adapter in zip(fresh.weights, before, *fresh.lists[1:]):
        expected = weight.double() + reference.delta_weight(*adapter)
        torch.testing.assert_close(got.double(), expected, rtol=3 * torch.finfo(got.dtype).eps, atol=1e-6)


def calls_of(fresh) -> dict:
    return {**torch_loops(fresh), **ours(fresh)}


NAMES = list(calls_of(make_set([(2, 2)], 1, torch.float32, 0.0)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", NAMES)
def test_merge(benchmark, facts, small, call, dtype):
    fresh = given(small, dtype)
    run = calls_of(fresh)[call]
    check(run, fresh)
    moved = 2 * sum(weight.numel() * weight.element_size() for weight in fresh.weights)
    benchmark.group = f"merge of {len(fresh.weights)} modules, {dtype}"
    benchmark.extra_info.update(facts, dtype=dtype, bytes=moved)
    benchmark.pedantic(run, rounds=1 if small else 3, warmup_rounds=0)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_c3_to_the_best_loop(goal, small, threads, dtype, count):
    """Wall time, since threads share the work; each call the best of three, in turn."""
    threads(count)
    fresh = given(small, dtype)
    best = cost.fastest(calls_of(fresh), 0.0, 1 if small else 3, time.perf_counter)
    loop = min(best[name] for name in torch_loops(fresh))
    for name in ours(fresh):
        target = C3_TARGETS.get(dtype) if name == "merge_" else None
        label = "C3" if target else "  "
        goal(f"{label} {name} / best loop of PyTorch, {dtype}, threads: {count}", best[name] / loop, target)
