"""merge_ against float64: shapes, dtypes, views, reports, autograd; by the extension and by PyTorch."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_calls import (
    HALF_OR_SINGLE,
    NATIVE,
    bytes_of,
    error,
    make,
    merged,
    plain_pytorch,
)

from fastlora import reference
from fastlora.ops import merge as merge_module
from fastlora.ops.merge import merge_


def make_case(n, k, r, dtype, adapter_dtype=torch.float32):
    weight, *adapter = make(n, k, r, dtype, adapter_dtype)
    limit = 2 * error(plain_pytorch(weight, *adapter, 0.7), weight, *adapter, 0.7)
    return weight, adapter, limit


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", HALF_OR_SINGLE)
@pytest.mark.parametrize(("n", "k", "r"), [(1, 1, 1), (33, 17, 3), (64, 768, 16), (197, 50, 257)])
def test_error_is_at_most_twice_that_of_pytorch(backend, n, k, r, dtype, adapter_dtype):
    weight, adapter, limit = make_case(n, k, r, dtype, adapter_dtype)
    out, report = merged(weight, *adapter, scaling=0.7)
    assert error(out, weight, *adapter, 0.7) <= limit
    assert report.dtype is dtype and report.shape == (n, k) and report.kept_rank == int((adapter[2] != 0).sum())


@pytest.mark.parametrize("dtype", HALF_OR_SINGLE)
def test_the_limit_catches_one_percent(dtype):
    weight, adapter, limit = make_case(64, 768, 16, dtype)
    out, _ = merged(weight, *adapter, scaling=0.7 * 1.01)
    assert error(out, weight, *adapter, 0.7) > limit


def test_float64_weights_are_merged_in_float64():
    weight, *adapter = make(dtype=torch.float64)
    out, _ = merged(weight, *adapter)
    assert error(out, weight, *adapter, 1.0) < 1e-13
    assert merge_([weight], *([tensor] for tensor in adapter)).backend == "torch"


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(0, 20)),
    dtype=st.sampled_from(HALF_OR_SINGLE),
    adapter_dtype=st.sampled_from((*HALF_OR_SINGLE, torch.float64)),
    layout=st.sampled_from(["contiguous", "transposed", "rows", "columns"]),
    steps=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 2**31),
)
def test_any_shape_dtype_and_stride(shape, dtype, adapter_dtype, layout, steps, seed):
    """Equal to the contiguous merge in every bit, near float64, and nothing beside the view is written."""
    torch.manual_seed(seed)
    n, k, r = shape
    weight, lora_a, lora_b, gate = make(n, k, r, dtype, adapter_dtype)
    plain, plain_report = merged(weight, lora_a, lora_b, gate)
    limit = 2 * error(plain_pytorch(weight, lora_a, lora_b, gate, 1.0), weight, lora_a, lora_b, gate, 1.0)
    # PyTorch may hit the truth of a tiny case by luck; float32's own spacing is always allowed
    limit += 4e-7 * float(weight.float().norm() + reference.delta_weight(lora_a, lora_b, gate).norm())
    assert error(plain, weight, lora_a, lora_b, gate, 1.0) <= limit

    frame = torch.full((n + 4, k + 6), 7.0, dtype=dtype)
    frame = frame.t().contiguous().t() if layout == "transposed" else frame
    view = {"rows": frame[2 : n + 2], "columns": frame[:, 3 : k + 3]}.get(layout, frame)
    view = {"rows": view[:, :k], "columns": view[:n]}.get(layout, view[1 : n + 1, 1 : k + 1]).copy_(weight)
    before, outside = frame.clone(), torch.ones_like(frame, dtype=torch.bool)
    outside[
        {"rows": slice(2, n + 2), "columns": slice(0, n)}.get(layout, slice(1, n + 1)),
        {"rows": slice(0, k), "columns": slice(3, k + 3)}.get(layout, slice(1, k + 1)),
    ] = False
    wide_a = lora_a.repeat_interleave(steps[0], 0).repeat_interleave(steps[1], 1)[:: steps[0], :: steps[1]]
    report = merge_([view], [wide_a], [lora_b.t().contiguous().t()], [gate.repeat_interleave(2)[::2]]).modules[0]
    assert torch.equal(bytes_of(view), bytes_of(plain))
    assert torch.equal(frame[outside], before[outside])
    assert report.kept_rank == plain_report.kept_rank
    assert report.delta_norm == pytest.approx(plain_report.delta_norm)
    assert (report.unchanged, report.max_relative_error) == (plain_report.unchanged, plain_report.max_relative_error)


def test_many_modules_of_many_dtypes_in_one_call():
    cases = [make(dtype=dtype) for dtype in (*HALF_OR_SINGLE, torch.float64, torch.float16)]
    expected = [merged(*case, scaling=float(i + 1)) for i, case in enumerate(cases)]
    weights, *adapters = map(list, zip(*cases))
    report = merge_(weights, *adapters, scaling=[1.0, 2.0, 3.0, 4.0, 5.0], names=list("abcde"))
    assert report.backend == ("cpp+torch" if NATIVE else "torch")
    for name, weight, module, (alone, alone_report) in zip("abcde", weights, report, expected):
        assert torch.equal(weight, alone)
        assert module == replace(alone_report, name=name)


def test_no_modules():
    report = merge_([], [], [], [])
    assert len(report) == 0 and report.backend == "none"


def test_packed_projection_is_merged_through_its_rows(backend):
    packed = torch.nn.Parameter(torch.randn(96, 32))
    before, adapters = packed.detach().clone(), [make(32, 32, r)[1:] for r in (4, 0, 2)]
    merge_(list(packed.detach().chunk(3)), *map(list, zip(*adapters)))
    expected = torch.cat([reference.merge(row, *adapter) for row, adapter in zip(before.chunk(3), adapters)])
    torch.testing.assert_close(packed.detach(), expected)
    assert torch.equal(packed.detach()[32:64], before[32:64])


@pytest.mark.parametrize("dtype", HALF_OR_SINGLE)
def test_nothing_kept_leaves_every_byte(backend, dtype):
    weight, lora_a, lora_b, gate = make(dtype=dtype)
    weight[0, :3] = torch.tensor([-0.0, float("nan"), float("inf")], dtype=dtype)
    for adapter in ((lora_a[:0], lora_b[:, :0], gate[:0]), (lora_a, lora_b, torch.zeros_like(gate))):
        out, report = merged(weight, *adapter)
        assert torch.equal(bytes_of(out), bytes_of(weight))
        assert (report.kept_rank, report.delta_norm, report.unchanged, report.max_relative_error) == (0, 0.0, 0.0, 0.0)


def test_an_update_of_zero_leaves_every_byte(backend):
    weight, lora_a, lora_b, gate = make(dtype=torch.float16)
    weight[0, 0] = -0.0
    out, report = merged(weight, lora_a, torch.zeros_like(lora_b), gate)
    assert torch.equal(bytes_of(out), bytes_of(weight)) and report.kept_rank == 4


def test_report_tells_what_rounding_did(backend):
    """Weights of 1 in float16, the next number 2^-10 away: a quarter of that step vanishes, one and a half round up."""
    weight, lora_a, lora_b = torch.ones(8, 32, dtype=torch.float16), torch.ones(1, 32), torch.ones(8, 1)
    lora_a[0, :8], lora_a[0, 8:16], lora_a[0, 16:] = 2.0**-12, 1.5 * 2.0**-10, 0.0
    out, report = merged(weight, lora_a, lora_b, torch.ones(1))
    assert out[0].tolist() == [1.0] * 8 + [1 + 2.0**-9] * 8 + [1.0] * 16
    assert report.unchanged == 0.5
    assert report.delta_norm == pytest.approx(float((lora_b @ lora_a).norm()), rel=1e-6)
    assert report.max_relative_error == pytest.approx(2.0**-11 / (1 + 1.5 * 2.0**-10), rel=1e-6)


def test_relative_error_of_float32_is_that_of_the_sum(backend):
    weight, lora_a, lora_b, gate = make(r=2)
    out, report = merged(weight, lora_a, lora_b, gate)
    delta = lora_b[:, :1] * gate[0] @ lora_a[:1]
    truth = weight.double() + delta.double()
    assert report.max_relative_error == pytest.approx(float(((out.double() - truth) / truth).abs().max()), rel=1e-3)


def test_report_reads_as_a_table(backend):
    report = merge_(*([tensor] for tensor in make(dtype=torch.bfloat16)), names=["visual.q"])
    text = str(report)
    assert "visual.q" in text and "bfloat16" in text and f"1 modules merged by {backend}" in text
    assert len(report) == 1 and [module.name for module in report] == ["visual.q"]


# ---- autograd


@pytest.mark.parametrize("view", [False, True])
def test_backward_after_a_merge_raises(backend, view):
    """The linear layer saved the weight for the gradient of x; a merge in between would make that gradient wrong."""
    weight, *adapter = make()
    x = torch.randn(3, 40, requires_grad=True)
    loss = torch.nn.functional.linear(x, weight[8:24] if view else weight).sum()
    part = weight[8:24] if view else weight
    merge_([part], [adapter[0]], [adapter[1][8:24] if view else adapter[1]], [adapter[2]])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_with_gradients_and_inference_tensors_are_merged(backend):
    weight, *adapter = make()
    expected, _ = merged(weight, *adapter)
    parameters = [torch.nn.Parameter(tensor) for tensor in (weight.clone(), *adapter)]
    merge_(*([parameter] for parameter in parameters))
    assert torch.equal(parameters[0].detach(), expected) and parameters[0].requires_grad
    with torch.inference_mode():
        frozen = weight.clone()
        merge_([frozen], *([tensor] for tensor in adapter))
        assert torch.equal(frozen, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_threads_on_one_weight_lose_no_update(dtype):
    """float32 in the extension, which lets other threads run; float64 in PyTorch."""
    side, times = 384, 12
    weight, ones = torch.zeros(side, side, dtype=dtype), (torch.ones(1, side), torch.ones(side, 1), torch.ones(1))

    def work():
        for _ in range(times):
            merge_([weight], *([tensor] for tensor in ones))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bool((weight == 2 * times).all())


def test_a_child_of_a_fork_has_a_turn_of_its_own():
    """Another thread is in a merge while this one forks; it does not exist in the child."""
    lists, inside, done = [[tensor] for tensor in make(4, 4)], threading.Event(), threading.Event()

    def hold():
        with merge_module._turn:
            inside.set()
            done.wait()

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    inside.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        merge_(*lists)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    done.set()
    thread.join()
