"""Projection of rows onto the ranks: s = x @ down.T, and p = [dy_0 @ b_0 | dy_1 @ b_1 | dy_2 @ b_2] of packed projections.

One launch either way. Elements moved: x once (M*K), s written (M*R); the ranks' matrix once per row block, from L2.
Every sum is float32; s is rounded once to the dtype of x. Deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from fastlora.triton_kernels import aot_cases, common, tiles
from fastlora.triton_kernels.aot_cases import CompileCase
from fastlora.triton_kernels.common import advance, dot, round_to, tile_ptrs
from fastlora.triton_kernels.tiles import TileConfig


@triton.jit
def ranks_of_part(part, R, R0, R1, PARTS: tl.constexpr, ALIGNED_RANKS: tl.constexpr):
    # first rank and number of ranks of projection `part`; R0, R1: ranks of the first two of three, R: of all
    offset, rank = 0, R
    if PARTS == 3:
        offset = tl.where(part == 0, 0, tl.where(part == 1, R0, R0 + R1))
        rank = tl.where(part == 0, R0, tl.where(part == 1, R1, R - R0 - R1))
        if ALIGNED_RANKS:  # else rows of a [d, rank] matrix are read one element at a time
            offset = tl.multiple_of(offset, 16)
            rank = tl.multiple_of(rank, 16)
    return offset, rank


@triton.jit(do_not_specialize=["M", "R0", "R1"])
def rank_project_kernel(
    x_ptr, down_ptr, s_ptr,
    M, K, R, R0, R1,
    stride_xm, stride_xk, stride_dr, stride_dk,
    PARTS: tl.constexpr, ALIGNED_RANKS: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # K: columns of one projection. Of a packed one, down is flat: a contiguous [K, rank] after the other
    part = tl.program_id(1)
    offset, rank = ranks_of_part(part, R, R0, R1, PARTS, ALIGNED_RANKS)
    offs_r = tl.arange(0, BLOCK_R)
    if PARTS == 3:
        x_ptr += tl.cast(K, tl.int64) * part * stride_xk
        down_ptr += tl.cast(K, tl.int64) * offset
        stride_dk = rank
        K = tl.where(rank > 0, K, 0)  # a projection without ranks is not read
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m[:, None] < M
    mask_r = offs_r[None, :] < rank
    x_ptrs = tile_ptrs(x_ptr, offs_m, stride_xm, offs_k, stride_xk)  # [BLOCK_M, BLOCK_K]
    down_ptrs = tile_ptrs(down_ptr, offs_k, stride_dk, offs_r, stride_dr)  # [BLOCK_K, BLOCK_R]

    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_x, mask_d = mask_m, mask_r
        if not EVEN_K:
            mask_x &= offs_k[None, :] < K - k
            mask_d &= offs_k[:, None] < K - k
        x = tl.load(x_ptrs, mask=mask_x, other=0.0)
        down = tl.load(down_ptrs, mask=mask_d, other=0.0)
        acc = dot(x, down, acc, PRECISION)
        x_ptrs = advance(x_ptrs, BLOCK_K, stride_xk)
        down_ptrs = advance(down_ptrs, BLOCK_K, stride_dk)

    s = round_to(acc, s_ptr.dtype.element_ty)
    tl.store(tile_ptrs(s_ptr + offset, offs_m, R, offs_r, 1), s, mask=mask_m & mask_r)


def rank_project(x: torch.Tensor, down: torch.Tensor, *, tile: TileConfig | None = None) -> torch.Tensor:
    """Project rows onto the ranks: `x @ down.T`.

    Args:
        x: [M, K], any strides.
        down: [R, K], dtype of x, any strides; R <= 256.
        tile: by default `tiles.pick_rank_tile` chooses.
    Returns:
        s: [M, R] contiguous, dtype of x. Accumulated in float32, rounded once.
    """
    assert down.shape[1:] == x.shape[1:]
    return _project(x, down, (down.shape[0],), (down.stride(0), down.stride(1)), tile)


def rank_project_packed(
    dy: torch.Tensor, lora_b: torch.Tensor, ranks: tuple[int, ...], *, tile: TileConfig | None = None
) -> torch.Tensor:
    """Project the three shares of packed rows onto their own ranks: `[dy_0 @ b_0 | dy_1 @ b_1 | dy_2 @ b_2]`.

    Args:
        dy: [M, 3 d], any strides.
        lora_b: [d * R] contiguous, dtype of dy: the contiguous matrices b_0, b_1, b_2, [d, rank] each, one after the other.
        ranks: of each projection; R is their sum, at most 256.
        tile: by default `tiles.pick_rank_tile` chooses.
    Returns:
        p: [M, R] contiguous, dtype of dy. Accumulated in float32, rounded once.
    """
    assert len(ranks) == 3 and dy.shape[1] % 3 == 0 and lora_b.shape == (dy.shape[1] // 3 * sum(ranks),)
    assert lora_b.is_contiguous()
    return _project(dy, lora_b, ranks, (1, 1), tile)


def _project(
    x: torch.Tensor, down: torch.Tensor, ranks: tuple[int, ...], strides: tuple[int, int], tile: TileConfig | None
) -> torch.Tensor:
    """`strides` of down along R and K; of a packed one, K's is the rank of each projection."""
    (m, k), r, parts = (x.shape[0], x.shape[1] // len(ranks)), sum(ranks), len(ranks)
    assert down.dtype == x.dtype and r <= common.MAX_RANK and max(m, x.shape[1]) <= common.MAX_SIDE
    s = torch.empty((m, r), dtype=x.dtype, device=x.device)
    if s.numel() == 0:
        return s
    aligned = all(rank % 16 == 0 for rank in ranks)
    tile = tile or tiles.pick_rank_tile("project", max(ranks), x, aligned=aligned)
    with common.on_device(x):
        rank_project_kernel[(triton.cdiv(m, tile.block_m), parts)](
            x_ptr=x, down_ptr=down, s_ptr=s, M=m, K=k, R=r, R0=ranks[0], R1=ranks[1] if parts == 3 else 0,
            stride_xm=x.stride(0), stride_xk=x.stride(1), stride_dr=strides[0], stride_dk=strides[1],
            PARTS=parts, ALIGNED_RANKS=aligned, EVEN_K=k % tile.block_k == 0,
            PRECISION=common.dot_precision(common.compute_type(x)),
            BLOCK_M=tile.block_m, BLOCK_K=tile.block_k, BLOCK_R=tiles.rank_block(max(ranks)), **tile.launch,
        )  # fmt: skip
    return s


# name, projections, strides that are 1: s of the forward, p of dX, and p of packed projections
ROLES = (("s", 1, ("stride_dk",)), ("p", 1, ("stride_dr",)), ("packed", 3, ("stride_dr", "stride_dk")))


def compile_cases(arch: str, compute: str) -> Iterator[CompileCase]:
    """Every shipped config, operands contiguous as forward (s) and dX (p) read them; packed at the most ranks."""
    element, kernel = common.element_type(compute), rank_project_kernel
    pointers = dict.fromkeys(("x_ptr", "down_ptr", "s_ptr"), f"*{element}")
    fixed: dict[str, int | bool | str] = {"PRECISION": common.dot_precision(compute), "stride_xk": 1}
    for size, tile in tiles.tile_configs("project", compute, arch).items():
        blocks = fixed | {"BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k}
        cases = aot_cases.rank_cases(size, kernel)
        for r, odd in cases:
            ranks = blocks | {"BLOCK_R": r, "EVEN_K": not odd, "ALIGNED_RANKS": not odd}
            for role, parts, units in ROLES if (r, odd) == cases[-1] else ROLES[:2]:
                constexprs = ranks | {"PARTS": parts} | dict.fromkeys(units, 1)
                yield CompileCase(kernel, f"project {role} {size}", compute, r, pointers, constexprs, tile, odd)
