"""p and the sums over M of `rank_lora_grad.py` in one launch that reads every element of dy and x once.

    p = dy @ lora_b   [M, R]        partial_a = x[rows].T @ p[rows]   [K, R]        partial_b = dy[rows].T @ s[rows]   [N, R]

A program takes a block of rows. It walks over the columns of dy: each tile adds to p and gives its rows of partial_b.
Then p is complete, is rounded, and the program walks over the columns of x for partial_a. With more row blocks than
programs a program takes several blocks in turn and adds to its own partial buffers.

Elements moved: M*(K + N) read; (K + N)*R float32 written per row block, and read again; lora_b read per row block, from
L2. Packed projections: a program walks over the three shares of dy, then once over x.

With row gates p and s are multiplied by T(gate of the row) * scaling before the sums: float32, rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from fastlora.triton_kernels import common, tiles
from fastlora.triton_kernels.aot_cases import CompileCase
from fastlora.triton_kernels.common import advance, dot, round_to, tile_ptrs
from fastlora.triton_kernels.rank_grad_columns import gate_rows, rank_tile
from fastlora.triton_kernels.tiles import TileConfig

# bounds the partial buffers; about two programs per multiprocessor of the largest device
MAX_PROGRAMS = 256


@triton.jit(do_not_specialize=["M", "rows_per_gate", "stride_kappa"])
def rank_grad_one_read_kernel(
    x_ptr, s_ptr, dy_ptr, p_ptr, lora_b_ptr, gate_ptr, kappa_ptr, partial_a_ptr, partial_b_ptr,
    M, N, K, R, R0, R1, rows_per_gate, scaling,
    stride_xm, stride_xk, stride_dm, stride_dn, stride_kappa,
    PARTS: tl.constexpr, SEVERAL_BLOCKS: tl.constexpr, ROW_GATE: tl.constexpr,
    MAKE_P: tl.constexpr, STORE_P: tl.constexpr, SUM_A: tl.constexpr, SUM_B: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # N: columns of one projection. R0, R1: ranks of the first two of three projections; R: of all
    program = tl.program_id(0)
    num_blocks = tl.cdiv(M, BLOCK_M)
    share = num_blocks // tl.num_programs(0)
    rest = num_blocks % tl.num_programs(0)
    first = program * share + tl.minimum(program, rest)
    last = first + share + (program < rest).to(tl.int32)
    offs_r = tl.arange(0, BLOCK_R)
    rank_offs = rank_tile(tl.arange(0, BLOCK_M), R, offs_r)  # of s and p
    partial_a_ptr += program.to(tl.int64) * K * R
    partial_b_ptr += program.to(tl.int64) * N * R

    for block in range(first, last):
        first_m = block * BLOCK_M
        offs_m = first_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m[:, None] < M
        first_rank = tl.cast(first_m, tl.int64) * R
        add = block > first
        p0 = tl.zeros((BLOCK_M, BLOCK_R), dtype=dy_ptr.dtype.element_ty)
        # a loop at run time: three copies of its body take more registers than there are
        for part in range(PARTS):
            offset, rank = 0, R
            if PARTS == 3:
                offset = tl.where(part == 0, 0, tl.where(part == 1, R0, R0 + R1))
                rank = tl.where(part == 0, R0, tl.where(part == 1, R1, R - R0 - R1))
            mask = mask_m & (offs_r[None, :] < rank)
            u = tl.zeros((BLOCK_M, BLOCK_R), dtype=dy_ptr.dtype.element_ty)
            if SUM_B:
                u = tl.load(s_ptr + first_rank + offset + rank_offs, mask=mask, other=0.0)
                if ROW_GATE:
                    u = gate_rows(
                        u, gate_ptr, kappa_ptr, R, stride_kappa, scaling, rows_per_gate, first_m, offs_r, mask, BLOCK_M
                    )
            matrix = tl.cast(N, tl.int64) * offset  # of lora_b and partial_b in their flat layout
            p0 = _walk_dy(
                dy_ptr + tl.cast(N, tl.int64) * part * stride_dn, stride_dm, stride_dn, lora_b_ptr + matrix,
                partial_b_ptr + matrix, u, M, N, rank, offs_m, offs_r, add,
                SEVERAL_BLOCKS, MAKE_P, SUM_B, PRECISION, BLOCK_N,
            )  # fmt: skip
            if STORE_P:
                tl.store(p_ptr + first_rank + offset + rank_offs, p0, mask=mask)
        if SUM_A:
            p1 = p0
            p2 = p0
            if PARTS == 3:
                tl.debug_barrier()  # a thread reads what another one wrote
                p_ptrs = p_ptr + first_rank + rank_offs
                p0 = tl.load(p_ptrs, mask=mask_m & (offs_r[None, :] < R0), other=0.0)
                p1 = tl.load(p_ptrs + R0, mask=mask_m & (offs_r[None, :] < R1), other=0.0)
                p2 = tl.load(p_ptrs + R0 + R1, mask=mask_m & (offs_r[None, :] < R - R0 - R1), other=0.0)
            if ROW_GATE:
                mask = mask_m & (offs_r[None, :] < R)
                p0 = gate_rows(
                    p0, gate_ptr, kappa_ptr, R, stride_kappa, scaling, rows_per_gate, first_m, offs_r, mask, BLOCK_M
                )
            _walk_x(
                x_ptr, stride_xm, stride_xk, partial_a_ptr, p0, p1, p2, M, K, R, R0, R1, offs_m, offs_r, add,
                PARTS, SEVERAL_BLOCKS, PRECISION, BLOCK_K,
            )  # fmt: skip
        if SEVERAL_BLOCKS:
            tl.debug_barrier()  # the next block may read a partial sum in another thread than the one that wrote it


@triton.jit
def _walk_dy(
    dy_ptr, stride_dm, stride_dn, b_ptr, partial_ptr, u, M, N, rank, offs_m, offs_r, add,
    SEVERAL_BLOCKS: tl.constexpr, MAKE_P: tl.constexpr, SUM_B: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    # dy @ b, rounded  # [BLOCK_M, BLOCK_R];  partial = dy.T @ u  # [N, rank]
    # both dots take dy as [BLOCK_N, BLOCK_M]: with a transpose between, its loads would not be pipelined on sm_80
    offs_n = tl.arange(0, BLOCK_N)
    dy_ptrs = tile_ptrs(dy_ptr, offs_n, stride_dn, offs_m, stride_dm)
    b_ptrs = tile_ptrs(b_ptr, offs_r, 1, offs_n, rank)  # [BLOCK_R, BLOCK_N]
    acc = tl.zeros((u.shape[1], u.shape[0]), dtype=tl.float32)
    # a projection without ranks is not read
    for n in range(0, tl.where(rank > 0, N, 0), BLOCK_N):
        mask_n = offs_n < N - n
        dy = tl.load(dy_ptrs, mask=mask_n[:, None] & (offs_m[None, :] < M), other=0.0)
        if MAKE_P:
            mask_b = (offs_r[:, None] < rank) & mask_n[None, :]
            b = tl.load(b_ptrs, mask=mask_b, other=0.0)
            acc = dot(b, dy, acc, PRECISION)
            b_ptrs = advance(b_ptrs, BLOCK_N, rank)
        if SUM_B:
            _add_partial(partial_ptr, rank, dy, u, n, offs_n, mask_n, rank, offs_r, add, SEVERAL_BLOCKS, PRECISION)
        dy_ptrs = advance(dy_ptrs, BLOCK_N, stride_dn)
    return tl.trans(round_to(acc, u.dtype))


@triton.jit
def _walk_x(
    x_ptr, stride_xm, stride_xk, partial_ptr, p0, p1, p2, M, K, R, R0, R1, offs_m, offs_r, add,
    PARTS: tl.constexpr, SEVERAL_BLOCKS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # partial = x.T @ [p0 | p1 | p2]  # [K, R]
    offs_k = tl.arange(0, BLOCK_K)
    rank0 = R if PARTS == 1 else R0
    x_ptrs = tile_ptrs(x_ptr, offs_k, stride_xk, offs_m, stride_xm)  # [BLOCK_K, BLOCK_M]
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs, mask=mask_k[:, None] & (offs_m[None, :] < M), other=0.0)
        _add_partial(partial_ptr, R, x, p0, k, offs_k, mask_k, rank0, offs_r, add, SEVERAL_BLOCKS, PRECISION)
        if PARTS == 3:
            part_ptr = partial_ptr + R0
            _add_partial(part_ptr, R, x, p1, k, offs_k, mask_k, R1, offs_r, add, SEVERAL_BLOCKS, PRECISION)
            part_ptr += R1
            _add_partial(part_ptr, R, x, p2, k, offs_k, mask_k, R - R0 - R1, offs_r, add, SEVERAL_BLOCKS, PRECISION)
        x_ptrs = advance(x_ptrs, BLOCK_K, stride_xk)


@triton.jit
def _add_partial(
    partial_ptr, stride_pc, v, u, c, offs_c, mask_c, rank, offs_r, add,
    SEVERAL_BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # partial[c + offs_c] = v @ u, plus what is there if add
    mask = mask_c[:, None] & (offs_r[None, :] < rank)
    ptrs = tile_ptrs(partial_ptr, c + offs_c, stride_pc, offs_r, 1)
    acc = dot(v, u, tl.zeros((v.shape[0], u.shape[1]), dtype=tl.float32), PRECISION)
    if SEVERAL_BLOCKS:
        if add:  # a branch, not a mask: a load of the loop itself would be pipelined into shared memory on sm_100
            acc += tl.load(ptrs, mask=mask, other=0.0)
    tl.store(ptrs, acc, mask=mask)


def rank_grad_one_read(
    x: torch.Tensor,
    s: torch.Tensor | None,
    dy: torch.Tensor,
    lora_b: torch.Tensor,
    gate: torch.Tensor,
    kappa: torch.Tensor,
    scaling: float,
    ranks: tuple[int, ...],
    sum_a: bool,
    need_p: bool,
    tile: TileConfig,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Partial sums of dA' (if `sum_a`) and dB' (if s is given), and p (if needed).

    Args:
        x: [M, K], dy: [M, N]: any strides. s: [M, R] contiguous. lora_b: [N, R] any strides, or flat for three `ranks`.
        gate: [R] is not applied here, [G, R] is. kappa: 0-d or [R]. ranks: of each projection, none above `tiles.ONE_READ_RANKS`.
    Returns:
        partial_a: [programs, K, R], partial_b: [programs, N // len(ranks) * R] as lora_b if flat, p: [M, R], dtype of dy.
    """
    (m, k), width, r, parts = x.shape, dy.shape[1] // len(ranks), sum(ranks), len(ranks)
    assert max(ranks) <= tiles.ONE_READ_RANKS
    blocks = triton.cdiv(m, tile.block_m)
    programs = min(blocks, MAX_PROGRAMS)
    partial_a = torch.empty((programs, k, r), dtype=torch.float32, device=x.device) if sum_a else None
    partial_b = None if s is None else torch.empty((programs, width * r), dtype=torch.float32, device=x.device)
    store_p = need_p or (sum_a and parts == 3)  # three of them pass through memory on their way to the sums over x
    p = torch.empty((m, r), dtype=dy.dtype, device=x.device) if store_p else None
    with common.on_device(x):
        rank_grad_one_read_kernel[(programs,)](
            # an operand that is not used is not read: dy stands in for its pointer
            x_ptr=x, s_ptr=dy if s is None else s, dy_ptr=dy, p_ptr=dy if p is None else p, lora_b_ptr=lora_b.contiguous(),
            gate_ptr=gate, kappa_ptr=kappa, partial_a_ptr=gate if partial_a is None else partial_a,
            partial_b_ptr=gate if partial_b is None else partial_b,
            M=m, N=width, K=k, R=r, R0=ranks[0], R1=ranks[1] if parts == 3 else 0,
            rows_per_gate=m // gate.shape[0] if gate.dim() == 2 else 1, scaling=scaling,
            stride_xm=x.stride(0), stride_xk=x.stride(1), stride_dm=dy.stride(0), stride_dn=dy.stride(1),
            stride_kappa=kappa.stride(0) if kappa.dim() else 0,
            PARTS=parts, SEVERAL_BLOCKS=programs < blocks, ROW_GATE=gate.dim() == 2,
            MAKE_P=sum_a or need_p, STORE_P=store_p, SUM_A=sum_a, SUM_B=s is not None,
            PRECISION=common.dot_precision(common.compute_type(x)),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            BLOCK_R=tiles.rank_block(max(ranks)), **tile.launch,
        )  # fmt: skip
    return partial_a, partial_b, p


def compile_cases(arch: str, compute: str) -> Iterator[CompileCase]:
    """Every shipped config with all outputs; what a launch may ask for beside that on one rank of each size."""
    element, kernel = common.element_type(compute), rank_grad_one_read_kernel
    pointers = dict.fromkeys(("x_ptr", "s_ptr", "dy_ptr", "p_ptr", "lora_b_ptr"), f"*{element}")
    pointers |= dict.fromkeys(("gate_ptr", "kappa_ptr", "partial_a_ptr", "partial_b_ptr"), "*fp32")
    fixed: dict[str, int | bool | str] = {"PRECISION": common.dot_precision(compute), "stride_xk": 1, "stride_dn": 1}
    fixed |= dict.fromkeys(("MAKE_P", "STORE_P", "SUM_A", "SUM_B"), True)
    plain, several, packed, row_gate = (1, False, False), (1, True, False), (3, True, False), (1, True, True)
    odd_rank = ("R", "R0", "R1")
    wanted = {
        "narrow": ((16, (), plain), (16, (), packed), (16, odd_rank, row_gate)),
        "short": ((16, (), plain), (64, (), several), (64, odd_rank, packed), (64, odd_rank, row_gate)),
        "wide": ((32, (), plain), (64, (), packed), (64, (), row_gate)),
        "ragged": ((64, tuple(kernel.arg_names), packed), (64, tuple(kernel.arg_names), row_gate)),
    }
    for size, tile in tiles.tile_configs("one_read", compute, arch).items():
        blocks = fixed | {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
        for r, odd, (parts, several_blocks, gated) in wanted[size]:
            flags = {"PARTS": parts, "SEVERAL_BLOCKS": several_blocks, "ROW_GATE": gated, "BLOCK_R": r}
            label = f"one_read grad {size}{' packed' * (parts == 3)}{' row gate' * gated}"
            yield CompileCase(kernel, label, compute, r, pointers, blocks | flags, tile, odd)
