"""The descriptor kernels under Triton's interpreter: every variant, gate mode and packing, and what they refuse."""

from __future__ import annotations

import pytest
import torch
import triton
from helpers import make_operands, reference_in
from kernel_calls import definition, make_call, make_packed, run

from fastlora.triton_kernels import common, is_interpreted, rank_lora_fwd, rank_lora_tma, rank_project, tiles
from fastlora.triton_kernels.rank_lora_tma import why_not_tma

if not is_interpreted():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

HALF = (torch.float16, torch.bfloat16)
VARIANTS = ("split", "one_pass", "leader")
TILE = tiles.tile_configs("tma_gemm", "fp16", common.INTERPRETER)["small"]


@pytest.fixture
def launches(monkeypatch):
    """Number of launches of the descriptor kernel, so that no test passes by way of the pointer kernels."""
    counted, launch = [], rank_lora_tma.rank_lora_tma_kernel

    class Counting:
        def __getitem__(self, grid):
            counted.append(grid)
            return launch[grid]

    monkeypatch.setattr(rank_lora_tma, "rank_lora_tma_kernel", Counting())
    return counted


@pytest.fixture
def assert_exact(check, launches):
    def compare(call, variant):
        results = run(call, variant, tile=TILE)
        assert len(launches) == 2
        truth = definition(call, torch.float64)
        assert {name: v.shape for name, v in results.items()} == {name: v.shape for name, v in truth.items()}
        check(results, definition(call, call.op.x.dtype), truth)
        return results

    return compare


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("gate_rows", (None, 7, 70))
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_and_gates_over_ragged_tiles(variant, gate_rows, dtype, assert_exact):
    """70 rows, 48 columns and 40 of K over tiles of 32; rows of 16 bytes each."""
    assert_exact(make_call(70, 40, 48, 5, dtype, gate_rows), variant)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("width", (32, 40), ids=("filled", "an edge in every projection"))
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_projections(variant, width, dtype, assert_exact):
    assert_exact(make_packed(40, 40, width, (3, 0, 5), dtype), variant)


def test_columns_that_a_descriptor_cannot_write_are_stored_by_pointers(assert_exact):
    """37 columns of y are 74 bytes a row."""
    call = make_call(40, 40, 40, 4, torch.float16)
    call.op.weight, call.op.bias, call.op.lora_b = call.op.weight[:37], call.op.bias[:37], call.op.lora_b[:37]
    y, _ = rank_lora_fwd(*call.op.tensors(), call.kappa, 1.0, tile=TILE)
    expected = reference_in(torch.float64, call.op, torch.ones(40, 37).half(), 0.3, 1.0)["y"]
    torch.testing.assert_close(y.double(), expected, atol=0.02, rtol=0.02)


def test_a_slice_of_wider_rows(assert_exact):
    call = make_call(40, 40, 48, 5, torch.float16)
    call.op.x = torch.cat((call.op.x, call.op.x), 1)[:, :40]
    call.op.weight = torch.cat((call.op.weight, call.op.weight), 1)[:, :40]
    assert call.op.x.stride(0) == call.op.weight.stride(0) == 80
    assert_exact(call, "one_pass")


@pytest.mark.parametrize("variant", VARIANTS)
def test_s_is_the_projection_and_two_runs_are_bit_equal(variant):
    call = make_call(70, 40, 48, 5, torch.float16)
    first, second = (run(call, variant, tile=TILE) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(first["s"], rank_project(call.op.x, call.op.lora_a))


@pytest.mark.parametrize("m, n, r", [(0, 8, 3), (3, 8, 0), (1, 8, 16)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_small_and_empty_sizes(variant, m, n, r):
    call = make_call(m, 16, n, r, torch.float16)
    results = run(call, variant, tile=TILE)
    expected = definition(call, torch.float64)
    for name, value in results.items():
        assert value.shape == expected[name].shape and not value.isnan().any()
        torch.testing.assert_close(value.double(), expected[name], atol=0.02, rtol=0.02)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
@pytest.mark.parametrize("variant", VARIANTS)
def test_non_finite_values_travel_as_in_torch(variant, bad):
    for spoil in ("x", "weight", "bias", "lora_a", "lora_b", "gate"):
        op = make_operands((40,), 40, 48, 5, torch.float16)
        getattr(op, spoil).view(-1)[3] = bad
        expected = reference_in(torch.float16, op, torch.ones(40, 48).half(), 0.1, 1.0)["y"]
        y, _ = rank_lora_fwd(*op.tensors(), torch.tensor(0.1), 1.0, variant=variant, tile=TILE)
        assert torch.equal(y.isnan(), expected.isnan()), spoil
        torch.testing.assert_close(y, expected, equal_nan=True, atol=0.02, rtol=0.02, msg=spoil)


@pytest.mark.parametrize("name", ("y", "dx"))
def test_a_planted_error_of_one_percent_fails(name, check):
    call = make_call(40, 40, 48, 5, torch.float16)
    results = run(call, "one_pass", tile=TILE)
    results[name] = (results[name].double() * 1.01).half()
    with pytest.raises(AssertionError, match=f"^{name}: error"):
        check(results, definition(call, torch.float16), definition(call, torch.float64))


def matrices(x=(40, 40), weight=(48, 40), dtype=torch.float16):
    return torch.zeros(*x, dtype=dtype), torch.zeros(*weight, dtype=dtype)


def test_what_descriptors_serve():
    x, weight = matrices()
    assert why_not_tma(x, weight) is None
    assert why_not_tma(x[:, :24], weight[:, :24]) is None
    assert why_not_tma(torch.zeros(40, 48).half(), weight.t()) is None  # dX reads the transpose


@pytest.mark.parametrize(
    "x, weight, text",
    [
        (*matrices(dtype=torch.float32), "take float16 and bfloat16, and x is torch.float32"),
        (matrices((40, 41))[0], matrices(weight=(48, 41))[1], "rows of x do not all start at a multiple of 16"),
        (matrices((40, 48))[0][:, 4:44], matrices()[1], "rows of x do not all start at a multiple of 16"),
        (matrices((40, 40))[0].t(), matrices()[1], "x has strides .1, 40."),
        (matrices()[0], matrices(weight=(48, 41))[1][:, :40], "rows of weight do not all start"),
        (matrices((40, 0))[0], matrices(weight=(48, 0))[1], "x has no elements to describe"),
        (torch.zeros(40).half().expand(40, 40), matrices()[1], "rows of x overlap"),
    ],
)
def test_what_descriptors_do_not_serve(x, weight, text):
    assert text.replace(".1, 40.", "[1, 40]") in why_not_tma(x, weight)
    op = make_operands((40,), x.shape[1], 48, 3, x.dtype)
    with pytest.raises(ValueError, match=f"asks for descriptors, but .*{text}.* Use a tile without tma"):
        rank_lora_fwd(x, weight, *op.tensors()[2:], torch.tensor(0.1), 1.0, tile=TILE)


def test_ranks_that_would_spill_take_the_pointer_kernel(monkeypatch):
    """On a device: the interpreter has no registers, and its tests cross the edges of odd ranks."""
    assert why_not_tma(*matrices(), (5,)) is None
    monkeypatch.setattr(common, "architecture", lambda tensor: "sm_90")
    assert why_not_tma(*matrices(), (16, 0, 32)) is None
    message = "the descriptor kernels take ranks that 16 divides, and these are 16, 5, 16"
    assert why_not_tma(*matrices(), (16, 5, 16)) == message


def test_older_devices_are_named(monkeypatch):
    monkeypatch.setattr(common, "architecture", lambda tensor: "sm_80")
    assert why_not_tma(*matrices()) == "tensor descriptors need sm_90 or newer, and the tensors are on sm_80"


def test_the_allocator_of_the_user_stays():
    def mine(size, alignment, stream):
        raise AssertionError("not called in the interpreter")

    from triton.runtime import _allocation

    triton.set_allocator(mine)
    try:
        run(make_call(40, 40, 48, 5, torch.float16), tile=TILE)
        assert _allocation._allocator.get() is mine
    finally:
        triton.set_allocator(_allocation.NullAllocator())
