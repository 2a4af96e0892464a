"""The sums over M of `rank_lora_grad.py` by column blocks of x and dy: any rank up to MAX_RANK, p and s given.

    partial_a[split] = x[rows].T @ p[rows]   [K, R]        partial_b[split] = dy[rows].T @ s[rows]   [N, R]

A program holds one column block and one range of rows. x and dy are read once, p and s once per column block; where p
has to be made first, dy is read twice in all, which is what `rank_grad_one_read.py` saves.

With row gates p and s are multiplied by T(gate of the row) * scaling first, in a launch each: float32, rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from fastlora.triton_kernels import aot_cases, common, tiles
from fastlora.triton_kernels.aot_cases import CompileCase
from fastlora.triton_kernels.common import advance, dot, round_to, soft_threshold, tile_ptrs
from fastlora.triton_kernels.tiles import TileConfig

# programs of a launch: fills every device, and bounds the partial buffers by 512 * block_n * R floats
PROGRAMS = 512
MAX_SPLITS = 32
GATE_TILE = TileConfig(0, 0, 0, 4, 1)


@triton.jit
def rank_tile(rows, stride, offs_r):
    # 32 bits, from the first of the rows of one tile: a row of ranks is short  # [rows, BLOCK_R]
    return rows[:, None] * stride + offs_r[None, :]


@triton.jit
def gate_rows(
    u, gate_ptr, kappa_ptr, R, stride_kappa, scaling, rows_per_gate, first, offs_r, mask, BLOCK_M: tl.constexpr
):
    # u * T(gate of the row) * scaling, for BLOCK_M rows from `first` on  # [BLOCK_M, BLOCK_R]
    first_gate = first // rows_per_gate
    rows = (first + tl.arange(0, BLOCK_M)) // rows_per_gate - first_gate
    gate_ptr += tl.cast(first_gate, tl.int64) * R
    gate = tl.load(gate_ptr + rank_tile(rows, R, offs_r), mask=mask, other=0.0).to(tl.float32)
    kappa = tl.load(kappa_ptr + offs_r * stride_kappa, mask=offs_r < R, other=0.0).to(tl.float32)
    return round_to(u.to(tl.float32) * (soft_threshold(gate, kappa[None, :]) * scaling), u.dtype)


@triton.jit(do_not_specialize=["M", "rows_per_gate", "stride_kappa"])
def gate_rows_kernel(
    u_ptr, gate_ptr, kappa_ptr, gated_ptr, M, R, rows_per_gate, scaling, stride_kappa,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mask = (first + offs_m[:, None] < M) & (offs_r[None, :] < R)
    base = first.to(tl.int64) * R
    offsets = rank_tile(offs_m, R, offs_r)
    u = tl.load(u_ptr + base + offsets, mask=mask, other=0.0)
    u = gate_rows(u, gate_ptr, kappa_ptr, R, stride_kappa, scaling, rows_per_gate, first, offs_r, mask, BLOCK_M)
    tl.store(gated_ptr + base + offsets, u, mask=mask)


@triton.jit(do_not_specialize=["M", "rows_per_split", "num_a_blocks"])
def rank_grad_columns_kernel(
    x_ptr, p_ptr, dy_ptr, s_ptr, partial_a_ptr, partial_b_ptr,
    M, N, K, R, rows_per_split, num_a_blocks,
    stride_xm, stride_xk, stride_dm, stride_dn, stride_um,
    UNIT_STRIDES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # partial[split] = v[rows of split].T @ u[rows of split]; v, u = x, p or dy, s; C columns in v  # [BLOCK_C, BLOCK_R]
    # selected pointers rather than two branches: each branch would hold its own shared memory
    block = tl.program_id(0)
    split = tl.program_id(1)
    for_a = block < num_a_blocks
    block = tl.where(for_a, block, block - num_a_blocks)
    v_ptr = tl.where(for_a, x_ptr, dy_ptr)
    u_ptr = tl.where(for_a, p_ptr, s_ptr)
    partial_ptr = tl.where(for_a, partial_a_ptr, partial_b_ptr)
    C = tl.where(for_a, K, N)
    stride_vm = tl.where(for_a, stride_xm, stride_dm)
    # a selected stride is not known to be 1, which wide loads need
    stride_vc = 1 if UNIT_STRIDES else tl.where(for_a, stride_xk, stride_dn)
    # stride_um: all stacked ranks, which a row of partial_a holds too; a row of partial_b holds R
    stride_pc = tl.where(for_a, stride_um, R)

    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, M)
    offs_m = first + tl.arange(0, BLOCK_M)
    offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = tl.arange(0, BLOCK_R)
    mask_c = offs_c[:, None] < C
    mask_r = offs_r[None, :] < R
    v_ptrs = tile_ptrs(v_ptr, offs_c, stride_vc, offs_m, stride_vm)  # [BLOCK_C, BLOCK_M]
    u_ptrs = tile_ptrs(u_ptr, offs_m, stride_um, offs_r, 1)  # [BLOCK_M, BLOCK_R]

    acc = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    for m in range(first, last, BLOCK_M):
        mask_m = m + tl.arange(0, BLOCK_M) < last
        v = tl.load(v_ptrs, mask=mask_c & mask_m[None, :], other=0.0)
        u = tl.load(u_ptrs, mask=mask_m[:, None] & mask_r, other=0.0)
        acc = dot(v, u, acc, PRECISION)
        v_ptrs = advance(v_ptrs, BLOCK_M, stride_vm)
        u_ptrs = advance(u_ptrs, BLOCK_M, stride_um)

    partial_ptr += split.to(tl.int64) * C * stride_um
    tl.store(tile_ptrs(partial_ptr, offs_c, stride_pc, offs_r, 1), acc, mask=mask_c & mask_r)


def num_row_splits(m: int, blocks: int, block_m: int) -> int:
    """Row ranges of a launch. Of shapes and tile, not of a device's multiprocessors: equal tiles give equal results."""
    return max(1, min(triton.cdiv(m, block_m), PROGRAMS // max(blocks, 1), MAX_SPLITS))


def rank_grad_columns(
    x: torch.Tensor,
    s: torch.Tensor | None,
    dy: torch.Tensor,
    p: torch.Tensor | None,
    gate: torch.Tensor,
    kappa: torch.Tensor,
    scaling: float,
    ranks: tuple[int, ...],
    tile: TileConfig | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Partial sums of dA' and dB', one launch per projection.

    Args:
        x: [M, K], dy: [M, N]: any strides. s, p: [M, R] contiguous or None: what the missing one is for is not summed.
        gate: [R] is not applied here, [G, R] is. kappa: 0-d or [R]. ranks: of each projection, which dy holds in
            equal shares of its columns.
    Returns:
        partial_a: [splits, K, R] and partial_b: [splits, N // len(ranks) * R], one [N // len(ranks), r] matrix after
        the other; float32, or None.
    """
    (m, k), width, r = x.shape, dy.shape[1] // len(ranks), sum(ranks)
    if gate.dim() == 2:
        p, s = (None if u is None else _gated(u, gate, kappa, scaling) for u in (p, s))
    tile = tile or tiles.pick_rank_tile("grad", max(ranks), x, dy)
    a_blocks = triton.cdiv(k, tile.block_n) if p is not None else 0
    b_blocks = triton.cdiv(width, tile.block_n) if s is not None else 0
    splits = num_row_splits(m, a_blocks + b_blocks, tile.block_m)
    partial_a = None if p is None else torch.empty((splits, k, r), dtype=torch.float32, device=x.device)
    partial_b = None if s is None else torch.empty((splits, width * r), dtype=torch.float32, device=x.device)
    with common.on_device(x):
        # an operand that is not used is not read: the other one stands in for its pointer
        read_p, read_s = s if p is None else p, p if s is None else s
        assert read_p is not None and read_s is not None
        for part, rank in enumerate(ranks):
            if rank == 0:
                continue
            offset = sum(ranks[:part])
            dy_part = dy.narrow(1, part * width, width)
            used_p, used_s = read_p.narrow(1, offset, rank), read_s.narrow(1, offset, rank)
            sums_a = partial_b if partial_a is None else partial_a[:, :, offset:]
            sums_b = partial_a if partial_b is None else partial_b[:, width * offset :]
            rank_grad_columns_kernel[(a_blocks + b_blocks, splits)](
                x_ptr=x, p_ptr=used_p, dy_ptr=dy_part, s_ptr=used_s,
                partial_a_ptr=sums_a, partial_b_ptr=sums_b, M=m, N=width, K=k, R=rank,
                rows_per_split=triton.cdiv(triton.cdiv(m, tile.block_m), splits) * tile.block_m,
                num_a_blocks=a_blocks,
                stride_xm=x.stride(0), stride_xk=x.stride(1), stride_dm=dy.stride(0), stride_dn=dy.stride(1),
                stride_um=r, UNIT_STRIDES=x.stride(1) == dy.stride(1) == 1,
                PRECISION=common.dot_precision(common.compute_type(x)),
                BLOCK_M=tile.block_m, BLOCK_C=tile.block_n, BLOCK_R=tiles.rank_block(rank), **tile.launch,
            )  # fmt: skip
    return partial_a, partial_b


def _gated(u: torch.Tensor, gate: torch.Tensor, kappa: torch.Tensor, scaling: float) -> torch.Tensor:
    """u * T(gate of the row) * scaling, dtype of u."""
    (m, r), gated = u.shape, torch.empty_like(u)
    blocks = _gate_blocks(tiles.rank_block(r))
    with common.on_device(u):
        gate_rows_kernel[(triton.cdiv(m, blocks["BLOCK_M"]),)](
            u_ptr=u, gate_ptr=gate, kappa_ptr=kappa, gated_ptr=gated, M=m, R=r, rows_per_gate=m // gate.shape[0],
            scaling=scaling, stride_kappa=kappa.stride(0) if kappa.dim() else 0, **blocks, **GATE_TILE.launch,
        )  # fmt: skip
    return gated


def _gate_blocks(block_r: int) -> dict[str, int]:
    return {"BLOCK_M": 1024 // block_r, "BLOCK_R": block_r}


def compile_cases(arch: str, compute: str) -> Iterator[CompileCase]:
    """Every shipped config with both sums needed, x and dy contiguous."""
    element, kernel = common.element_type(compute), rank_grad_columns_kernel
    pointers = dict.fromkeys(("x_ptr", "p_ptr", "dy_ptr", "s_ptr", "u_ptr", "gated_ptr"), f"*{element}")
    pointers |= dict.fromkeys(("gate_ptr", "kappa_ptr", "partial_a_ptr", "partial_b_ptr"), "*fp32")
    fixed: dict[str, int | bool | str] = {
        "PRECISION": common.dot_precision(compute),
        "UNIT_STRIDES": True,
        "stride_xk": 1,
        "stride_dn": 1,
    }
    for size, tile in tiles.tile_configs("grad", compute, arch).items():
        blocks = fixed | {"BLOCK_M": tile.block_m, "BLOCK_C": tile.block_n}
        for r, odd in aot_cases.rank_cases(size, kernel):
            constexprs = blocks | {"BLOCK_R": r}
            odd = (*odd, "stride_um") if odd else ()
            yield CompileCase(kernel, f"grad {size}", compute, r, pointers, constexprs, tile, odd)
    for r, odd in ((16, ()), (256, ("R",))):
        yield CompileCase(gate_rows_kernel, "grad gate rows", compute, r, pointers, _gate_blocks(r), GATE_TILE, odd)
