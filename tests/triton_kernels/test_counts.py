"""Launches, and how often each operand is read and written, by variant: the counts that docs/kernels.md states."""

from __future__ import annotations

import pytest
import torch
from helpers import make_operands
from kernel_calls import make_call, make_packed, run

from fastlora.ops import rank_lora_linear
from fastlora.triton_kernels import common, is_interpreted, rank_lora_dx, rank_lora_fwd, tiles

if not is_interpreted():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

M, K, N, R = 72, 48, 80, 4
BLOCK = 32
ROWS, COLUMNS = -(-M // BLOCK), -(-N // BLOCK)  # tiles of y
TILES = {
    "pointers": tiles.tile_configs("gemm", "fp16", common.INTERPRETER)["ragged"],
    "descriptors": tiles.tile_configs("tma_gemm", "fp16", common.INTERPRETER)["small"],
}
# each element's loads: x; weight; lora_a; lora_b; s
FORWARD = {
    "split": {"x": COLUMNS + 1, "weight": ROWS, "lora_a": ROWS, "lora_b": ROWS, "s": COLUMNS},
    "one_pass": {"x": COLUMNS, "weight": ROWS, "lora_a": ROWS * COLUMNS, "lora_b": ROWS, "s": 0},
    "leader": {"x": COLUMNS, "weight": ROWS, "lora_a": ROWS, "lora_b": ROWS, "s": COLUMNS},
}
LAUNCHES = {"split": 2, "one_pass": 1, "leader": 1}


@pytest.mark.parametrize("kind", TILES)
@pytest.mark.parametrize("variant", FORWARD)
def test_forward(variant, kind, reads, writes, launches):
    op = make_operands((M,), K, N, R, torch.float16)
    y, s = rank_lora_fwd(*op.tensors(), torch.tensor(0.1), 1.0, variant=variant, tile=TILES[kind])
    assert len(launches) == LAUNCHES[variant]
    assert writes(y) == writes(s) == {1}
    counted = {"x": op.x, "weight": op.weight, "lora_a": op.lora_a, "lora_b": op.lora_b, "s": s}
    assert {name: reads(tensor) for name, tensor in counted.items()} == {
        name: {count} for name, count in FORWARD[variant].items()
    }
    assert reads(y) == {0}


@pytest.mark.parametrize("variant", FORWARD)
def test_dx_with_p_given_is_one_launch_that_reads_neither_lora_b_nor_dy_twice(variant, reads, writes, launches):
    call = make_call(M, K, N, R, torch.float16)
    op, p = call.op, torch.randn(M, R).half()
    dx, _ = rank_lora_dx(
        call.dy, op.weight, op.lora_a, op.lora_b, op.gate, call.kappa, 1.0, p=p, variant=variant, tile=TILES["pointers"]
    )
    columns = -(-K // BLOCK)
    assert launches == ["rank_lora_fwd_kernel"] and writes(dx) == {1}
    assert (reads(call.dy), reads(op.lora_b), reads(p)) == ({columns}, {0}, {columns})


@pytest.mark.parametrize("variant", FORWARD)
def test_packed_projections_are_one_product(variant, reads, writes, launches):
    """Three separate calls would read x three times as often; each tile reads the adapters of its projection alone."""
    call = make_packed(M, K, BLOCK, (3, 0, 5), torch.float16)
    results = run(call, variant, p=torch.zeros(M, 8).half(), tile=TILES["pointers"])
    assert len(launches) == LAUNCHES[variant] + 1  # and dx
    assert writes(results["y"]) == {1}
    assert reads(call.op.x) == {FORWARD[variant]["x"] - COLUMNS + 3}
    assert reads(call.op.lora_b) == {ROWS}


@pytest.mark.parametrize(
    "needed, names",
    [
        # dx and every gradient of the adapter
        (("x", "lora_a", "lora_b", "gate"), ["rank_grad_one_read_kernel", "finish", "gate", "rank_lora_fwd_kernel"]),
        # frozen layer: dx alone, and p with it
        (("x",), ["rank_project_kernel", "rank_lora_fwd_kernel"]),
        # frozen lora_a: x is not read
        (("lora_b", "gate"), ["rank_grad", "finish", "gate"]),
        # first layer: x needs no gradient
        (("lora_a", "lora_b", "gate"), ["rank_grad_one_read_kernel", "finish", "gate"]),
        (("lora_b",), ["rank_grad", "finish"]),
    ],
)
def test_backward_launches_what_is_needed(needed, names, launches, reads):
    op = make_operands((M,), K, N, R, torch.float16)
    for name in needed:
        getattr(op, name).requires_grad_(True)
    y = rank_lora_linear(*op.tensors(), 0.1, backend="split")
    launches.clear()
    before = reads(op.x)
    torch.autograd.grad(y, [getattr(op, name) for name in needed], torch.ones_like(y))
    assert len(launches) == len(names), launches
    assert all(part in name for part, name in zip(names, launches)), launches
    if "x" not in needed and "lora_a" not in needed:
        assert reads(op.x) == before
