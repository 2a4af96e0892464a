"""Gradients from the partial sums of `rank_lora_grad.py`: launches 2 and 3.

    dlora_a = scaling * T(gate)[:, None] * sum of partial_a.T        dlora_b = scaling * sum of partial_b * T(gate)[None, :]
    dgate_i = scaling * <lora_b[:, i], sum of partial_b[:, i]> where gate_i is alive (lora_a and partial_a likewise)

Row gates [G, R] are in the sums already; their gradient sums p * s over the rows of each gate row.

Numerics: float32; partial sums are added in order, products of blocks too. Deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.triton_kernels import aot_cases, common, tiles
from fastlora.triton_kernels.aot_cases import CompileCase
from fastlora.triton_kernels.common import is_dead, soft_threshold, tile_ptrs
from fastlora.triton_kernels.tiles import TileConfig

# launches 2 and 3 move a few megabytes: one tile serves them
FINISH_TILE = TileConfig(16, 0, 0, 4, 1)
# elements a program has in flight: the partial buffers of one block lie far apart, so many are read at once
FINISH_ELEMENTS = 4096
ROW_GATE_ELEMENTS = 1024


@triton.jit(do_not_specialize=["num_splits", "num_a_blocks", "stride_kappa"])
def rank_grad_finish_kernel(
    partial_a_ptr, partial_b_ptr, lora_a_ptr, lora_b_ptr, gate_ptr, kappa_ptr,
    dlora_a_ptr, dlora_b_ptr, gate_partial_ptr,
    N, K, R, R0, R1, scaling, num_splits, num_a_blocks,
    stride_ar, stride_ak, stride_bn, stride_br, stride_kappa,
    PARTS: tl.constexpr, ROW_GATE: tl.constexpr,
    STORE_A: tl.constexpr, STORE_B: tl.constexpr, GATE_FROM_A: tl.constexpr, GATE_FROM_B: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # N: columns of one projection. R0, R1: ranks of the first two of three projections; R: of all
    pid = tl.program_id(0)
    part = tl.program_id(1)
    offset, rank = 0, R
    if PARTS == 3:
        offset = tl.where(part == 0, 0, tl.where(part == 1, R0, R0 + R1))
        rank = tl.where(part == 0, R0, tl.where(part == 1, R1, R - R0 - R1))
        stride_bn = rank
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < rank
    factor = tl.full((BLOCK_R,), 1.0, dtype=tl.float32)  # a row gate is in the sums already
    if not ROW_GATE:
        gate = tl.load(gate_ptr + offset + offs_r, mask=mask_r, other=0.0).to(tl.float32)
        kappa = tl.load(kappa_ptr + (offset + offs_r) * stride_kappa, mask=mask_r, other=0.0).to(tl.float32)
        factor = soft_threshold(gate, kappa) * scaling
    if pid < num_a_blocks:
        a = tl.cast(offset, tl.int64)
        _finish_block(
            partial_a_ptr + a, R, lora_a_ptr + a * stride_ar, stride_ak, stride_ar,
            dlora_a_ptr + a * K, 1, K, gate_partial_ptr + offset, pid, factor, offs_r, mask_r, K, R, num_splits,
            STORE_A, GATE_FROM_A, BLOCK_S, BLOCK_C, BLOCK_R,
        )  # fmt: skip
    else:
        b = tl.cast(offset, tl.int64) * N
        _finish_block(
            partial_b_ptr + b, rank, lora_b_ptr + b, stride_bn, stride_br,
            dlora_b_ptr + b, rank, 1, gate_partial_ptr + offset, pid - num_a_blocks, factor, offs_r, mask_r, N, R,
            num_splits, STORE_B, GATE_FROM_B, BLOCK_S, BLOCK_C, BLOCK_R,
        )  # fmt: skip


@triton.jit
def _finish_block(
    partial_ptr, stride_pc, adapter_ptr, stride_ac, stride_ar, grad_ptr, stride_gc, stride_gr, gate_partial_ptr, block,
    factor, offs_r, mask_r, C, R, num_splits,
    STORE: tl.constexpr, FOR_GATE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_s = tl.arange(0, BLOCK_S)
    mask = (offs_c[:, None] < C) & mask_r[None, :]
    ptrs = tile_ptrs(partial_ptr, offs_c, stride_pc, offs_r, 1)[None, :, :]
    split_size = tl.cast(C, tl.int64) * R
    ptrs += offs_s.to(tl.int64)[:, None, None] * split_size  # [BLOCK_S, BLOCK_C, BLOCK_R]

    total = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    for first in range(0, num_splits, BLOCK_S):
        mask_s = (offs_s < num_splits - first)[:, None, None]
        total += tl.sum(tl.load(ptrs, mask=mask_s & mask[None, :, :], other=0.0), axis=0)
        ptrs += split_size * BLOCK_S
    if STORE:
        tl.store(tile_ptrs(grad_ptr, offs_c, stride_gc, offs_r, stride_gr), total * factor[None, :], mask=mask)
    if FOR_GATE:
        adapter = tl.load(tile_ptrs(adapter_ptr, offs_c, stride_ac, offs_r, stride_ar), mask=mask, other=0.0)
        product = tl.sum(total * adapter.to(tl.float32), axis=0)  # [BLOCK_R]
        tl.store(gate_partial_ptr + tl.cast(block, tl.int64) * R + offs_r, product, mask=mask_r)


@triton.jit(do_not_specialize=["num_blocks", "stride_kappa"])
def rank_grad_gate_kernel(
    gate_partial_ptr, gate_ptr, kappa_ptr, dgate_ptr, num_blocks, R, scaling, stride_kappa,
    BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    total = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for first in range(0, num_blocks, BLOCK_B):
        offs_b = first + tl.arange(0, BLOCK_B)
        mask = (offs_b[:, None] < num_blocks) & mask_r[None, :]
        total += tl.sum(tl.load(tile_ptrs(gate_partial_ptr, offs_b, R, offs_r, 1), mask=mask, other=0.0), axis=0)
    gate = tl.load(gate_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)
    dead = is_dead(gate, tl.load(kappa_ptr + offs_r * stride_kappa, mask=mask_r, other=0.0).to(tl.float32))
    tl.store(dgate_ptr + offs_r, tl.where(dead, 0.0, total * scaling), mask=mask_r)


@triton.jit(do_not_specialize=["G", "rows_per_gate", "stride_kappa"])
def rank_grad_row_gate_kernel(
    p_ptr, s_ptr, gate_ptr, kappa_ptr, dgate_ptr, G, R, rows_per_gate, scaling, stride_kappa,
    BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # dgate[g] = scaling * sum of p * s over the rows of gate row g, where alive  # [BLOCK_G, BLOCK_R]
    offs_g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    offs_r = tl.arange(0, BLOCK_R)
    mask = (offs_g[:, None] < G) & (offs_r[None, :] < R)
    total = tl.zeros((BLOCK_G, BLOCK_R), dtype=tl.float32)
    for first in range(0, rows_per_gate, BLOCK_M):
        offs_m = first + tl.arange(0, BLOCK_M)
        rows = offs_g.to(tl.int64)[:, None, None] * rows_per_gate + offs_m[None, :, None]
        offsets = rows * R + offs_r[None, None, :]  # [BLOCK_G, BLOCK_M, BLOCK_R]
        mask_m = mask[:, None, :] & (offs_m < rows_per_gate)[None, :, None]
        p = tl.load(p_ptr + offsets, mask=mask_m, other=0.0).to(tl.float32)
        s = tl.load(s_ptr + offsets, mask=mask_m, other=0.0).to(tl.float32)
        total += tl.sum(p * s, axis=1)
    gate = tl.load(tile_ptrs(gate_ptr, offs_g, R, offs_r, 1), mask=mask, other=0.0).to(tl.float32)
    kappa = tl.load(kappa_ptr + offs_r * stride_kappa, mask=offs_r < R, other=0.0).to(tl.float32)
    dead = is_dead(gate, kappa[None, :])
    tl.store(tile_ptrs(dgate_ptr, offs_g, R, offs_r, 1), tl.where(dead, 0.0, total * scaling), mask=mask)


def finish(
    partial_a: Tensor | None, partial_b: Tensor | None, lora_a: Tensor, lora_b: Tensor, gate: Tensor, kappa: Tensor,
    scaling: float, ranks: tuple[int, ...], dlora_a: Tensor | None, dlora_b: Tensor | None, dgate: Tensor | None,
) -> None:  # fmt: skip
    """Launches 2 and 3: gradients from partial sums; the gate's if it is [R]."""
    r, k, parts, block_r = gate.shape[-1], lora_a.shape[1], len(ranks), tiles.rank_block(max(ranks))
    width = lora_b.shape[0] if parts == 1 else lora_b.shape[0] // r
    sums = partial_a if partial_b is None else partial_b
    assert sums is not None
    stride_kappa = kappa.stride(0) if kappa.dim() else 0
    a_blocks = triton.cdiv(k, FINISH_TILE.block_m) if partial_a is not None else 0
    b_blocks = triton.cdiv(width, FINISH_TILE.block_m) if partial_b is not None else 0
    gate_blocks = b_blocks or a_blocks
    gate_partial = None
    if dgate is not None and gate.dim() == 1:
        gate_partial = torch.empty((gate_blocks, r), dtype=torch.float32, device=gate.device)
    with common.on_device(gate):
        rank_grad_finish_kernel[(a_blocks + b_blocks, parts)](
            # what is not used is not touched: the sums stand in for its pointer
            partial_a_ptr=sums if partial_a is None else partial_a,
            partial_b_ptr=sums if partial_b is None else partial_b, lora_a_ptr=lora_a, lora_b_ptr=lora_b,
            gate_ptr=gate, kappa_ptr=kappa, dlora_a_ptr=sums if dlora_a is None else dlora_a,
            dlora_b_ptr=sums if dlora_b is None else dlora_b,
            gate_partial_ptr=sums if gate_partial is None else gate_partial,
            N=width, K=k, R=r, R0=ranks[0], R1=ranks[1] if parts == 3 else 0, scaling=scaling,
            num_splits=sums.shape[0], num_a_blocks=a_blocks,
            stride_ar=lora_a.stride(0), stride_ak=lora_a.stride(1),
            stride_bn=lora_b.stride(0), stride_br=lora_b.stride(-1), stride_kappa=stride_kappa,
            PARTS=parts, ROW_GATE=gate.dim() == 2, STORE_A=dlora_a is not None, STORE_B=dlora_b is not None,
            GATE_FROM_A=gate_partial is not None and b_blocks == 0,
            GATE_FROM_B=gate_partial is not None and b_blocks > 0, **_finish_blocks(block_r), **FINISH_TILE.launch,
        )  # fmt: skip
        if gate_partial is not None:
            rank_grad_gate_kernel[(triton.cdiv(r, block_r),)](
                gate_partial_ptr=gate_partial, gate_ptr=gate, kappa_ptr=kappa, dgate_ptr=dgate,
                num_blocks=gate_blocks, R=r, scaling=scaling, stride_kappa=stride_kappa,
                **_gate_blocks(block_r), **FINISH_TILE.launch,
            )  # fmt: skip


def row_gate(p: Tensor, s: Tensor, gate: Tensor, kappa: Tensor, scaling: float, dgate: Tensor) -> None:
    """Launch 3 of row gates: dgate [G, R] from p and s [M, R]."""
    g, r = gate.shape
    rows_per_gate = p.shape[0] // g
    blocks = _row_gate_blocks(tiles.rank_block(r), rows_per_gate)
    with common.on_device(p):
        rank_grad_row_gate_kernel[(triton.cdiv(g, blocks["BLOCK_G"]),)](
            p_ptr=p, s_ptr=s, gate_ptr=gate, kappa_ptr=kappa, dgate_ptr=dgate, G=g, R=r, rows_per_gate=rows_per_gate,
            scaling=scaling, stride_kappa=kappa.stride(0) if kappa.dim() else 0, **blocks, **FINISH_TILE.launch,
        )  # fmt: skip


def _finish_blocks(block_r: int) -> dict[str, int]:
    block_c = FINISH_TILE.block_m
    return {"BLOCK_S": max(FINISH_ELEMENTS // (block_c * block_r), 1), "BLOCK_C": block_c, "BLOCK_R": block_r}


def _gate_blocks(block_r: int) -> dict[str, int]:
    return {"BLOCK_B": FINISH_ELEMENTS // block_r, "BLOCK_R": block_r}


def _row_gate_blocks(block_r: int, rows_per_gate: int) -> dict[str, int]:
    """As many rows at once for few long gate rows as for many short ones."""
    rows = ROW_GATE_ELEMENTS // block_r
    block_m = min(triton.next_power_of_2(rows_per_gate), rows)
    return {"BLOCK_G": rows // block_m, "BLOCK_M": block_m, "BLOCK_R": block_r}


def compile_cases(arch: str, compute: str) -> Iterator[CompileCase]:
    """Smallest and largest ranks of the three kernels, every gradient needed, the adapters contiguous."""
    element = common.element_type(compute)
    outputs = ("gate_ptr", "kappa_ptr", "dlora_a_ptr", "dlora_b_ptr", "dgate_ptr", "gate_partial_ptr")
    pointers = dict.fromkeys(("partial_a_ptr", "partial_b_ptr", *outputs), "*fp32")
    pointers |= dict.fromkeys(("lora_a_ptr", "lora_b_ptr", "p_ptr", "s_ptr"), f"*{element}")
    flags = {"STORE_A": True, "STORE_B": True, "GATE_FROM_A": False, "GATE_FROM_B": True, "stride_ak": 1}
    flags |= {"ROW_GATE": False, "stride_br": 1}
    odd_ranks = (*aot_cases.ODD_RANK, "R0", "R1")
    for r, odd, parts in ((16, (), 1), (16, odd_ranks, 3), (256, (), 3), (256, odd_ranks, 1)):
        finished = flags | {"PARTS": parts} | _finish_blocks(r)
        yield CompileCase(rank_grad_finish_kernel, "grad finish", compute, r, pointers, finished, FINISH_TILE, odd)
        blocks = _gate_blocks(r)
        yield CompileCase(rank_grad_gate_kernel, "grad gate", compute, r, pointers, blocks, FINISH_TILE, odd)
        blocks = _row_gate_blocks(r, 1 if parts == 3 else 4096)
        yield CompileCase(rank_grad_row_gate_kernel, "grad gate sums", compute, r, pointers, blocks, FINISH_TILE, odd)
