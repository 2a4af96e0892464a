"""Gradients of lora_a, lora_b and the gate.

    dA' = p.T @ x    [R, K]        dlora_a = scaling * T(gate)[:, None] * dA'
    dB' = dy.T @ s   [N, R]        dlora_b = scaling * dB' * T(gate)[None, :]
    dgate_i = scaling * <lora_b[:, i], dB'[:, i]> * 1(gate_i alive: |gate_i| > kappa or kappa = 0)
             = scaling * <lora_a[i], dA'[i]> * 1(...)

with s = x @ lora_a.T and p = dy @ lora_b from the forward and dX kernels; y as in `rank_lora_fwd.py` (CoDyRA, arXiv
2412.01004). The gate needs no pass over the M rows: it is a dot of two matrices that are there already.

Launches: 3. (1) Sums over M in a fixed number of row ranges, each into its own partial buffer; x and dy are read once.
(2) Partial buffers are added in order, scaled and stored, and each block of lora_b is multiplied with its dB'.
(3) Those products are added in order into dgate. What is not needed is neither computed nor read.
Elements moved: M*(K + N) read, p and s once per column block, splits*(K + N)*R float32 written and read again.

Numerics: float32 from the first product to the stored gradient, which is float32 whatever the dtype of x. No atomics;
the number of row ranges depends on shapes and tile only, so two runs are bit-equal.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from fastlora.triton_kernels import aot_cases, common, tiles
from fastlora.triton_kernels.aot_cases import CompileCase
from fastlora.triton_kernels.common import advance, dot, is_dead, soft_threshold, tile_ptrs
from fastlora.triton_kernels.rank_lora_fwd import rank_project
from fastlora.triton_kernels.tiles import TileConfig

# programs of launch 1: fills every device, and bounds the partial buffers by 512 * block_n * R floats
PROGRAMS = 512
MAX_SPLITS = 32
# launches 2 and 3 move a few megabytes: one tile serves them
FINISH_TILE = TileConfig(32, 0, 0, 4, 1)
GATE_BLOCK = {"BLOCK_B": 16}


@triton.jit(do_not_specialize=["M", "rows_per_split", "num_a_blocks"])
def rank_grad_partial_kernel(
    x_ptr, p_ptr, dy_ptr, s_ptr, partial_a_ptr, partial_b_ptr,
    M, N, K, R, rows_per_split, num_a_blocks,
    stride_xm, stride_xk, stride_dm, stride_dn,
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

    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, M)
    offs_m = first + tl.arange(0, BLOCK_M)
    offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = tl.arange(0, BLOCK_R)
    mask_c = offs_c[:, None] < C
    mask_r = offs_r[None, :] < R
    v_ptrs = tile_ptrs(v_ptr, offs_c, stride_vc, offs_m, stride_vm)  # [BLOCK_C, BLOCK_M]
    u_ptrs = tile_ptrs(u_ptr, offs_m, R, offs_r, 1)  # [BLOCK_M, BLOCK_R]

    acc = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    for m in range(first, last, BLOCK_M):
        mask_m = m + tl.arange(0, BLOCK_M) < last
        v = tl.load(v_ptrs, mask=mask_c & mask_m[None, :], other=0.0)
        u = tl.load(u_ptrs, mask=mask_m[:, None] & mask_r, other=0.0)
        acc = dot(v, u, acc, PRECISION)
        v_ptrs = advance(v_ptrs, BLOCK_M, stride_vm)
        u_ptrs = advance(u_ptrs, BLOCK_M, R)

    partial_ptr += split.to(tl.int64) * C * R
    tl.store(tile_ptrs(partial_ptr, offs_c, R, offs_r, 1), acc, mask=mask_c & mask_r)


@triton.jit(do_not_specialize=["num_splits", "num_a_blocks"])
def rank_grad_finish_kernel(
    partial_a_ptr, partial_b_ptr, lora_a_ptr, lora_b_ptr, gate_ptr, kappa_ptr,
    dlora_a_ptr, dlora_b_ptr, gate_partial_ptr,
    N, K, R, scaling, num_splits, num_a_blocks,
    stride_ar, stride_ak, stride_bn, stride_br,
    STORE_A: tl.constexpr, STORE_B: tl.constexpr, GATE_FROM_A: tl.constexpr, GATE_FROM_B: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < num_a_blocks:
        _finish_block(
            partial_a_ptr, lora_a_ptr, stride_ak, stride_ar, dlora_a_ptr, 1, K, gate_partial_ptr, pid,
            gate_ptr, kappa_ptr, scaling, K, R, num_splits, STORE_A, GATE_FROM_A, BLOCK_C, BLOCK_R,
        )  # fmt: skip
    else:
        _finish_block(
            partial_b_ptr, lora_b_ptr, stride_bn, stride_br, dlora_b_ptr, R, 1, gate_partial_ptr, pid - num_a_blocks,
            gate_ptr, kappa_ptr, scaling, N, R, num_splits, STORE_B, GATE_FROM_B, BLOCK_C, BLOCK_R,
        )  # fmt: skip


@triton.jit
def _finish_block(
    partial_ptr, adapter_ptr, stride_ac, stride_ar, grad_ptr, stride_gc, stride_gr, gate_partial_ptr, block,
    gate_ptr, kappa_ptr, scaling, C, R, num_splits,
    STORE: tl.constexpr, FOR_GATE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    mask = (offs_c[:, None] < C) & mask_r[None, :]
    ptrs = tile_ptrs(partial_ptr, offs_c, R, offs_r, 1)
    split_size = tl.cast(C, tl.int64) * R

    total = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    for _ in range(0, num_splits):
        total += tl.load(ptrs, mask=mask, other=0.0)
        ptrs += split_size
    if STORE:
        gate = tl.load(gate_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)
        factor = soft_threshold(gate, tl.load(kappa_ptr).to(tl.float32)) * scaling
        tl.store(tile_ptrs(grad_ptr, offs_c, stride_gc, offs_r, stride_gr), total * factor[None, :], mask=mask)
    if FOR_GATE:
        adapter = tl.load(tile_ptrs(adapter_ptr, offs_c, stride_ac, offs_r, stride_ar), mask=mask, other=0.0)
        product = tl.sum(total * adapter.to(tl.float32), axis=0)  # [BLOCK_R]
        tl.store(gate_partial_ptr + tl.cast(block, tl.int64) * R + offs_r, product, mask=mask_r)


@triton.jit(do_not_specialize=["num_blocks"])
def rank_grad_gate_kernel(
    gate_partial_ptr, gate_ptr, kappa_ptr, dgate_ptr, num_blocks, R, scaling,
    BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    total = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for first in range(0, num_blocks, BLOCK_B):
        offs_b = first + tl.arange(0, BLOCK_B)
        mask = (offs_b[:, None] < num_blocks) & mask_r[None, :]
        total += tl.sum(tl.load(tile_ptrs(gate_partial_ptr, offs_b, R, offs_r, 1), mask=mask, other=0.0), axis=0)
    gate = tl.load(gate_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)
    dead = is_dead(gate, tl.load(kappa_ptr).to(tl.float32))
    tl.store(dgate_ptr + offs_r, tl.where(dead, 0.0, total * scaling), mask=mask_r)


def num_row_splits(m: int, blocks: int, block_m: int) -> int:
    """Row ranges of launch 1. Of shapes and tile, not of a device's multiprocessors: equal tiles give equal results."""
    return max(1, min(triton.cdiv(m, block_m), PROGRAMS // max(blocks, 1), MAX_SPLITS))


def rank_lora_grad(
    x: torch.Tensor,
    s: torch.Tensor | None,
    dy: torch.Tensor,
    p: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    gate: torch.Tensor,
    kappa: torch.Tensor,
    scaling: float,
    need_a: bool = True,
    need_b: bool = True,
    need_gate: bool = True,
    tile: TileConfig | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the adapter.

    Args:
        x: [M, K], dy: [M, N]: any strides. s: [M, R] of the forward, p: [M, R] of `rank_lora_dx`; None: computed here
            if needed (p where x needs no gradient, s where only x was saved).
        lora_a: [R, K], lora_b: [N, R], in the dtype of x. gate: [R], float32. kappa: 0-d float32 on the device.
        need_a, need_b, need_gate: what is not needed is returned as None. The gate uses dB', or dA' if only lora_a
            is needed beside it.
    Returns:
        dlora_a: [R, K], dlora_b: [N, R], dgate: [R]; contiguous, float32.
    Numerics:
        See the module docstring.
    """
    (m, k), n, r = x.shape, dy.shape[1], gate.shape[0]
    assert dy.shape == (m, n) and lora_a.shape == (r, k) and lora_b.shape == (n, r) and r <= common.MAX_RANK
    assert x.dtype == dy.dtype == lora_a.dtype == lora_b.dtype and kappa.dim() == 0 and max(m, n, k) <= common.MAX_SIDE
    allocate = torch.zeros if min(m, n, k) == 0 else torch.empty  # a sum over nothing is zero
    wanted = ((need_a, (r, k)), (need_b, (n, r)), (need_gate, (r,)))
    grads = [allocate(shape, dtype=torch.float32, device=x.device) if need else None for need, shape in wanted]
    if min(m, n, k, r) > 0 and (need_a or need_b or need_gate):
        _launch_grad(x, s, dy, p, lora_a, lora_b, gate.contiguous(), kappa, float(scaling), tile, *grads)
    return tuple(grads)


def _launch_grad(x, s, dy, p, lora_a, lora_b, gate, kappa, scaling, tile, dlora_a, dlora_b, dgate):
    (m, k), n, r = x.shape, dy.shape[1], gate.shape[0]
    use_a = dlora_a is not None
    use_b = dlora_b is not None or not use_a
    if use_a:
        p = rank_project(dy, lora_b.t()) if p is None else p.contiguous()
    if use_b:
        s = rank_project(x, lora_a) if s is None else s.contiguous()
    tile = tile or tiles.pick_rank_tile("grad", r, x, dy)
    block_r = tiles.rank_block(r)

    def count(rows_a, rows_b, block):
        return (triton.cdiv(rows_a, block) if use_a else 0), (triton.cdiv(rows_b, block) if use_b else 0)

    a_blocks, b_blocks = count(k, n, tile.block_n)
    splits = num_row_splits(m, a_blocks + b_blocks, tile.block_m)
    buffers = {"dtype": torch.float32, "device": x.device}
    partial_a = torch.empty((splits, k if use_a else 0, r), **buffers)
    partial_b = torch.empty((splits, n if use_b else 0, r), **buffers)
    with common.on_device(x):
        rank_grad_partial_kernel[(a_blocks + b_blocks, splits)](
            # an operand that is not used is not read: the other one stands in for its pointer
            x_ptr=x, p_ptr=p if use_a else s, dy_ptr=dy, s_ptr=s if use_b else p,
            partial_a_ptr=partial_a, partial_b_ptr=partial_b, M=m, N=n, K=k, R=r,
            rows_per_split=triton.cdiv(triton.cdiv(m, tile.block_m), splits) * tile.block_m, num_a_blocks=a_blocks,
            stride_xm=x.stride(0), stride_xk=x.stride(1), stride_dm=dy.stride(0), stride_dn=dy.stride(1),
            UNIT_STRIDES=x.stride(1) == dy.stride(1) == 1, PRECISION=common.dot_precision(common.compute_type(x)),
            BLOCK_M=tile.block_m, BLOCK_C=tile.block_n, BLOCK_R=block_r, **tile.launch,
        )  # fmt: skip
        a_blocks, b_blocks = count(k, n, FINISH_TILE.block_m)
        gate_blocks = b_blocks if use_b else a_blocks
        gate_partial = torch.empty((gate_blocks if dgate is not None else 0, r), **buffers)
        rank_grad_finish_kernel[(a_blocks + b_blocks,)](
            partial_a_ptr=partial_a, partial_b_ptr=partial_b, lora_a_ptr=lora_a, lora_b_ptr=lora_b,
            gate_ptr=gate, kappa_ptr=kappa, dlora_a_ptr=partial_a if dlora_a is None else dlora_a,
            dlora_b_ptr=partial_b if dlora_b is None else dlora_b, gate_partial_ptr=gate_partial,
            N=n, K=k, R=r, scaling=scaling, num_splits=splits, num_a_blocks=a_blocks,
            stride_ar=lora_a.stride(0), stride_ak=lora_a.stride(1),
            stride_bn=lora_b.stride(0), stride_br=lora_b.stride(1),
            STORE_A=dlora_a is not None, STORE_B=dlora_b is not None,
            GATE_FROM_A=dgate is not None and not use_b, GATE_FROM_B=dgate is not None and use_b,
            BLOCK_C=FINISH_TILE.block_m, BLOCK_R=block_r, **FINISH_TILE.launch,
        )  # fmt: skip
        if dgate is not None:
            rank_grad_gate_kernel[(1,)](
                gate_partial_ptr=gate_partial, gate_ptr=gate, kappa_ptr=kappa, dgate_ptr=dgate,
                num_blocks=gate_blocks, R=r, scaling=scaling, BLOCK_R=block_r, **GATE_BLOCK, **FINISH_TILE.launch,
            )  # fmt: skip


def compile_cases(arch: str, compute: str) -> Iterator[CompileCase]:
    """Every shipped config of the three kernels, every gradient needed, x, dy and the adapters contiguous."""
    element, precision = common.element_type(compute), common.dot_precision(compute)
    partials = {"partial_a_ptr": "*fp32", "partial_b_ptr": "*fp32"}
    kernel, operands = rank_grad_partial_kernel, ("x_ptr", "p_ptr", "dy_ptr", "s_ptr")
    pointers = dict.fromkeys(operands, f"*{element}") | partials
    for size, tile in tiles.tile_configs("grad", compute, arch).items():
        blocks = {"PRECISION": precision, "BLOCK_M": tile.block_m, "BLOCK_C": tile.block_n}
        for r, odd in aot_cases.rank_cases(size, kernel):
            constexprs = blocks | {"BLOCK_R": r, "UNIT_STRIDES": True, "stride_xk": 1, "stride_dn": 1}
            yield CompileCase(kernel, f"grad {size}", compute, r, pointers, constexprs, tile, odd)

    outputs = ("gate_ptr", "kappa_ptr", "dlora_a_ptr", "dlora_b_ptr", "dgate_ptr", "gate_partial_ptr")
    pointers = partials | dict.fromkeys(outputs, "*fp32") | dict.fromkeys(("lora_a_ptr", "lora_b_ptr"), f"*{element}")
    flags = {"STORE_A": True, "STORE_B": True, "GATE_FROM_A": False, "GATE_FROM_B": True}
    finish = flags | {"BLOCK_C": FINISH_TILE.block_m, "stride_ak": 1, "stride_br": 1}
    kernels = ((rank_grad_finish_kernel, "grad finish", finish), (rank_grad_gate_kernel, "grad gate", GATE_BLOCK))
    for r, odd in ((16, ()), (256, ()), (256, aot_cases.ODD_RANK)):
        for kernel, label, constexprs in kernels:
            constexprs = constexprs | {"BLOCK_R": r}
            yield CompileCase(kernel, label, compute, r, pointers, constexprs, FINISH_TILE, odd)
