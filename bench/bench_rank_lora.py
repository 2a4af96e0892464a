"""One adapted layer, forward, backward and both: fastlora by variant, and everyone else who computes the same.

    pytest bench/bench_rank_lora.py                      on a CPU its shapes in float32, and C1 and C2 against their targets;
                                                         on a GPU all shapes and LoRAFusion's grid in bfloat16
    pytest bench/bench_rank_lora.py --small              tiny shapes

Every rival is checked against the float64 definition before it is timed. On a CPU: one thread. On a GPU a call's time is
that of a turn through inputs larger than the L2 over their number, and extra_info also holds device times, launched
eagerly and replayed as a CUDA graph. For ratios on a GPU see gpu_suite.py, whose rivals take turns.
"""

from __future__ import annotations

import time

import cost
import pytest
import rivals
import torch
import torch._functorch.config
from gpu import timing
from rivals import peft_layer
from rivals.case import Case, Check, make_operands
from shapes import CPU_SHAPES, GPU_SHAPES, LORAFUSION_SHAPES, SMALL_GPU_SHAPES, Shape, cpu_shapes

# goals C1 and C2: forward + backward against PEFT; bytes saved for backward against the bytes of x
C1_TARGETS = {"b16-proj": 0.93, "b16-fc1": 0.85}
C2_TARGET = 1.022
MODES = ("forward", "backward", "both")
CUDA = torch.cuda.is_available()


def pytest_generate_tests(metafunc):
    small = metafunc.config.getoption("--small")
    if "shape" in metafunc.fixturenames:
        # of the small ones a plain and a packed layer
        layers = SMALL_GPU_SHAPES[:2] if small else (*GPU_SHAPES, *LORAFUSION_SHAPES) if CUDA else CPU_SHAPES
        metafunc.parametrize("shape", layers, ids=str)
    if "cpu_shape" in metafunc.fixturenames:
        metafunc.parametrize("cpu_shape", cpu_shapes(small), ids=str)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rival", rivals.ALL)
def test_layer(benchmark, facts, limits, small, rival, mode, shape):
    device = torch.device("cuda" if CUDA else "cpu")
    dtype = torch.bfloat16 if CUDA else torch.float32
    rotations = timing.rotations_for(device, shape.m * (shape.k + shape.n) * dtype.itemsize)
    operands = make_operands(shape, dtype, device, rotations=rotations)
    try:
        case = rivals.build(rival, operands, small=small)
    except rivals.Absent as absent:
        pytest.skip(str(absent))
    if case.checked:
        Check(operands, gradient=mode != "forward").worst(case)
    calls = calls_of(case, mode, rotations)
    flops, moved = shape.flops(mode), shape.bytes(mode, dtype.itemsize)
    benchmark.group = f"{mode} {shape}"
    benchmark.extra_info.update(
        facts, dtype=str(dtype).removeprefix("torch."), shape=str(shape), flops=flops, bytes=moved, note=case.note
    )
    calls_a_round = rotations if CUDA else 1
    benchmark(turn(calls, calls_a_round))
    seconds = benchmark.stats.stats.median / calls_a_round if benchmark.stats else None
    if CUDA:
        seconds = device_seconds(benchmark.extra_info, calls, device, rotations)
    if seconds:
        benchmark.extra_info.update(
            tflops=flops / seconds / 1e12,
            gbs=moved / seconds / 1e9,
            share_of_limit=max(flops / limits.flops, moved / limits.bytes) / seconds,
        )


def calls_of(case: Case, mode: str, rotations: int):
    """call(i), i the number of its input."""
    if mode != "backward":
        return getattr(case, mode)
    # a graph that is walked again and again may not give its buffers away
    torch._functorch.config.donated_buffer = False
    backwards = [case.backward(i) for i in range(rotations)]
    return lambda i: backwards[i]()


def turn(calls, count: int):
    """What pytest-benchmark times: one call on a CPU; on a GPU a turn through all inputs, waited for once."""
    if not CUDA:
        return lambda: calls(0)
    return lambda: ([calls(i) for i in range(count)], torch.cuda.synchronize())


def device_seconds(extra_info: dict, calls, device: torch.device, rotations: int) -> float | None:
    """Seconds of one call by the device's clock; notes both ways of launching."""
    for graph in (False, True):
        series = timing.interleaved({"call": calls}, device, rotations, seconds=0.2, graph=graph)["call"]
        extra_info["graph_us" if graph else "eager_us"] = series.summary()
    best = [extra_info[key]["median"] for key in ("graph_us", "eager_us") if extra_info[key]["median"]]
    return best[0] / 1e6 if best else None


def step(case: Case):
    """A call that runs forward and backward as training does; gradients are dropped, as an optimizer step would."""
    x, dy = case.operands.xs[0], case.operands.dys[0]

    def run() -> torch.Tensor:
        for leaf in (x, *case.leaves):
            leaf.grad = None
        (y,) = case.forward()
        y.backward(dy)
        return y

    return run


def cpu_case(rival: str, shape: Shape) -> Case:
    peft, absent = peft_layer.installed()
    if rival == "peft" and peft is None:
        pytest.skip(absent)
    operands = make_operands(shape, torch.float32, "cpu")
    case = rivals.build(rival, operands)
    if case.checked:
        Check(operands).worst(case)
    return case


@pytest.mark.parametrize("count", [1, 2])
def test_c1_ratio_to_peft(ratio, goal, threads, cpu_shape, count):
    threads(count)
    clock = time.process_time if count == 1 else time.perf_counter
    measured = _to_peft(ratio, "ours module", cpu_shape, clock)
    goal(f"C1 fwd+bwd / PEFT, {cpu_shape}, threads: {count}", measured, C1_TARGETS.get(cpu_shape.name, 0.93))


@pytest.mark.parametrize("rival", ["linear", "as released"])
def test_c1_of_the_limit_and_of_the_formula_as_written(ratio, goal, cpu_shape, rival):
    goal(f"   C1 of {rival}, {cpu_shape}", _to_peft(ratio, rival, cpu_shape))


def _to_peft(ratio, rival: str, shape: Shape, clock=time.process_time) -> float:
    return ratio(step(cpu_case(rival, shape)), step(cpu_case("peft", shape)), clock)


def saved_bytes(case: Case) -> int:
    """Bytes that a forward keeps for its backward, parameters aside; memory that is shared counts once."""
    return cost.kept_bytes(case.forward, besides=(case.operands.weight, case.operands.bias, *case.leaves))


@pytest.mark.parametrize("rival", ["ours module", "peft", "as released"])
def test_c2_saved_bytes(goal, rival, cpu_shape):
    case = cpu_case(rival, cpu_shape)
    x = case.operands.xs[0]
    share = saved_bytes(case) / (x.numel() * x.element_size())
    if rival == "ours module":
        assert share == 1 + cpu_shape.r / cpu_shape.k
        goal(f"C2 saved bytes / bytes of x, {cpu_shape}", share, C2_TARGET)
    else:
        goal(f"   C2 of {rival}, {cpu_shape}", share)
