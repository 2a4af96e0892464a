"""The rank product that every GEMM of the family adds to its accumulator: acc + scaling * (s * T_kappa(gate)) @ up.T."""

from __future__ import annotations

import triton
import triton.language as tl

from fastlora.triton_kernels.common import dot, round_to, soft_threshold, tile_ptrs


@triton.jit
def add_rank_product(
    acc, s, offs_r, offset, rank, R, up_ptr, stride_un, stride_ur, gate_ptr, kappa_ptr, stride_kappa, rows_per_gate,
    scaling, offs_m, offs_n, mask_m, mask_n, ROW_GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # s [BLOCK_M, BLOCK_R]: the ranks offs_r of a projection that has `rank` of the R, from `offset` on; up [N, rank]
    mask_r = offs_r < rank
    kappa = tl.load(kappa_ptr + (offset + offs_r) * stride_kappa, mask=mask_r, other=0.0).to(tl.float32)
    if ROW_GATE:
        gate_ptrs = tile_ptrs(gate_ptr, offs_m // rows_per_gate, R, offset + offs_r, 1)
        gate = tl.load(gate_ptrs, mask=mask_m & mask_r[None, :], other=0.0).to(tl.float32)
        factor = soft_threshold(gate, kappa[None, :]) * scaling  # [BLOCK_M, BLOCK_R]
    else:
        gate = tl.load(gate_ptr + offset + offs_r, mask=mask_r, other=0.0).to(tl.float32)
        factor = (soft_threshold(gate, kappa) * scaling)[None, :]
    up = tl.load(tile_ptrs(up_ptr, offs_r, stride_ur, offs_n, stride_un), mask=mask_r[:, None] & mask_n, other=0.0)
    return dot(round_to(s.to(tl.float32) * factor, up.dtype), up, acc, PRECISION)


@triton.jit
def add_rank_products(
    acc, s_ptr, offset, rank, R, up_ptr, stride_un, stride_ur, gate_ptr, kappa_ptr, stride_kappa, rows_per_gate,
    scaling, offs_m, offs_n, mask_m, mask_n, ROW_GATE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # the same for an s [M, R] in memory, BLOCK_R ranks a step; no step at all for rank = 0
    # one stage: buffers of this short loop would come on top of those of the K loop
    for r in tl.range(0, rank, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R)
        s_ptrs = tile_ptrs(s_ptr + offset, offs_m, R, offs_r, 1)
        s = tl.load(s_ptrs, mask=mask_m & (offs_r < rank)[None, :], other=0.0)
        acc = add_rank_product(
            acc, s, offs_r, offset, rank, R, up_ptr, stride_un, stride_ur, gate_ptr, kappa_ptr, stride_kappa,
            rows_per_gate, scaling, offs_m, offs_n, mask_m, mask_n, ROW_GATE, PRECISION,
        )  # fmt: skip
    return acc


@triton.jit
def pass_flag(flag, raise_it):
    # what was stored before the flag was raised can be read after it
    if raise_it:
        tl.debug_barrier()  # every thread has stored its part of s before one of them raises the flag
        tl.atomic_xchg(flag, 1, sem="release", scope="gpu")
    while tl.atomic_add(flag, 0, sem="acquire", scope="gpu") == 0:
        pass
    tl.debug_barrier()  # no thread reads s before the one that saw the flag
