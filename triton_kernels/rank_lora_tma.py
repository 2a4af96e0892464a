"""The GEMM of `rank_lora_fwd.py` for sm_90 and newer: persistent, tiles read and written by tensor descriptors.

    y = x @ weight.T + bias + scaling * (s * T_kappa(gate)) @ up.T     variants, packed projections, row gates: as there

The copy engine reads tiles of x and weight and writes tiles of y; no thread computes addresses for them, and what lies
past an edge is read as zero. The rank operands are small and read by pointers.

Descriptors are made on the device: published launch costs are 38 us with host-side ones against 16 without. They live in
scratch memory that Triton asks an allocator for at launch; ours comes from torch's caching allocator and is set for that
launch alone, so that an allocator of the user's stays in force.

Numerics: as `rank_lora_fwd.py`; float16 and bfloat16.
"""

from __future__ import annotations

import contextvars
import itertools
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from fastlora.triton_kernels import common, tiles
from fastlora.triton_kernels.aot_cases import CompileCase
from fastlora.triton_kernels.common import advance, dot, grouped_program, round_to, tile_ptrs
from fastlora.triton_kernels.epilogue import add_rank_product, add_rank_products, pass_flag
from fastlora.triton_kernels.rank_project import ranks_of_part
from fastlora.triton_kernels.tiles import TileConfig


@triton.jit
def _k_loop(
    x_desc, weight_desc, down_ptr, K, first_m, first_n, offs_r, mask_r, stride_dr, stride_dk,
    MAKE_S: tl.constexpr, WEIGHT_ALONG_N: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # x @ weight.T [BLOCK_M, BLOCK_N], and x @ down.T [BLOCK_M, BLOCK_R] if it makes s, else zeros
    offs_k = tl.arange(0, BLOCK_K)
    down_ptrs = tile_ptrs(down_ptr, offs_k, stride_dk, offs_r, stride_dr)  # [BLOCK_K, BLOCK_R]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc_s = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        x = x_desc.load([first_m, k])
        if WEIGHT_ALONG_N:
            w = weight_desc.load([k, first_n])
        else:
            w = weight_desc.load([first_n, k]).T
        acc = dot(x, w, acc, PRECISION)
        if MAKE_S:
            down = tl.load(down_ptrs, mask=mask_r & (offs_k[:, None] < K - k), other=0.0)
            acc_s = dot(x, down, acc_s, PRECISION)
            down_ptrs = advance(down_ptrs, BLOCK_K, stride_dk)
    return acc, acc_s


@triton.jit(do_not_specialize=["M", "R0", "R1", "rows_per_gate", "stride_kappa"])
def rank_lora_tma_kernel(
    x_ptr, weight_ptr, bias_ptr, down_ptr, up_ptr, gate_ptr, kappa_ptr, s_ptr, ready_ptr, y_ptr,
    M, N, K, R, R0, R1, rows_per_gate, scaling,
    stride_xm, stride_weight, stride_dr, stride_dk, stride_un, stride_ur, stride_kappa,
    VARIANT: tl.constexpr, PARTS: tl.constexpr, ALIGNED_RANKS: tl.constexpr, ROW_GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr, WEIGHT_ALONG_N: tl.constexpr, DESCRIBED_Y: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    # N: columns of one projection. Of packed ones, up is flat: a contiguous [N, rank] after the other
    x_desc = tl.make_tensor_descriptor(x_ptr, [M, K], [stride_xm, 1], [BLOCK_M, BLOCK_K])
    if WEIGHT_ALONG_N:  # dX: weight.T, which lies [K, N] in memory
        weight_desc = tl.make_tensor_descriptor(weight_ptr, [K, N * PARTS], [stride_weight, 1], [BLOCK_K, BLOCK_N])
    else:
        weight_desc = tl.make_tensor_descriptor(weight_ptr, [N * PARTS, K], [stride_weight, 1], [BLOCK_N, BLOCK_K])
    if DESCRIBED_Y:
        y_desc = tl.make_tensor_descriptor(y_ptr, [M, N * PARTS], [N * PARTS, 1], [BLOCK_M, BLOCK_N])
    num_n = tl.cdiv(N, BLOCK_N)
    num_tiles = tl.cdiv(M, BLOCK_M) * num_n * PARTS
    # leader: no deadlock, for the reason given in rank_lora_fwd.py; the grid and the order of tiles are the same
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        pid_m, pid_n = grouped_program(tile, M, num_n * PARTS * BLOCK_N, BLOCK_M, BLOCK_N, GROUP_M)
        part, column = 0, pid_n
        if PARTS == 3:
            part, column = pid_n // num_n, pid_n % num_n
        offset, rank = ranks_of_part(part, R, R0, R1, PARTS, ALIGNED_RANKS)
        first_m, first_n = pid_m * BLOCK_M, part * N + column * BLOCK_N
        offs_m = first_m + tl.arange(0, BLOCK_M)
        offs_n = column * BLOCK_N + tl.arange(0, BLOCK_N)  # within the projection
        offs_r = tl.arange(0, BLOCK_R)
        mask_m = offs_m[:, None] < M
        mask_n = offs_n[None, :] < N
        mask_r = offs_r[None, :] < rank
        up_part, stride_up = up_ptr, stride_un
        if PARTS == 3:
            up_part, stride_up = up_ptr + tl.cast(N, tl.int64) * offset, rank

        if VARIANT == "one_pass" or VARIANT == "leader" and column == 0:
            acc, acc_s = _k_loop(
                x_desc, weight_desc, down_ptr, K, first_m, first_n, offset + offs_r, mask_r, stride_dr, stride_dk,
                True, WEIGHT_ALONG_N, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
            )  # fmt: skip
            # a rank past the last would be inf * 0 in a row that has an inf
            s = round_to(tl.where(mask_r, acc_s, 0.0), s_ptr.dtype.element_ty)
            if column == 0:
                tl.store(tile_ptrs(s_ptr + offset, offs_m, R, offs_r, 1), s, mask=mask_m & mask_r)
        else:
            acc, _ = _k_loop(
                x_desc, weight_desc, down_ptr, K, first_m, first_n, offset + offs_r, mask_r, stride_dr, stride_dk,
                False, WEIGHT_ALONG_N, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
            )  # fmt: skip
        if VARIANT == "one_pass":
            acc = add_rank_product(
                acc, s, offs_r, offset, rank, R, up_part, stride_up, stride_ur, gate_ptr, kappa_ptr, stride_kappa,
                rows_per_gate, scaling, offs_m, offs_n, mask_m, mask_n, ROW_GATE, PRECISION,
            )  # fmt: skip
        else:
            if VARIANT == "leader":
                pass_flag(ready_ptr + pid_m * PARTS + part, column == 0)
            acc = add_rank_products(
                acc, s_ptr, offset, rank, R, up_part, stride_up, stride_ur, gate_ptr, kappa_ptr, stride_kappa,
                rows_per_gate, scaling, offs_m, offs_n, mask_m, mask_n, ROW_GATE, PRECISION, BLOCK_R,
            )  # fmt: skip
        if HAS_BIAS:
            acc += tl.load(bias_ptr + part * N + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
        y = round_to(acc, y_ptr.dtype.element_ty)
        if DESCRIBED_Y:
            y_desc.store([first_m, first_n], y)
        else:
            tl.store(tile_ptrs(y_ptr, offs_m, N * PARTS, part * N + offs_n, 1), y, mask=mask_m & mask_n)


def serves_ranks(arch: str, ranks: Sequence[int]) -> bool:
    """Whether the descriptor kernels take these ranks of projections.

    The rank product's factors come by pointers; of ranks that 16 does not divide they come one element at a time, which
    takes so many registers beside the persistent loop that 5 of 22 such kernels spill. The interpreter has none to spill.
    """
    return arch == common.INTERPRETER or all(rank % 16 == 0 for rank in ranks)


def why_not_tma(x: torch.Tensor, weight: torch.Tensor, ranks: Sequence[int] = ()) -> str | None:
    """The reason that descriptors cannot serve `x @ weight.T`, or None; x [M, K], weight [N, K] or a transposed view.

    ranks: of the projections.
    """
    arch = common.architecture(x)
    if arch not in ("sm_90", "sm_100", common.INTERPRETER):
        return f"tensor descriptors need sm_90 or newer, and the tensors are on {arch}"
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"the descriptor kernels take float16 and bfloat16, and x is {x.dtype}"
    for name, matrix in (("x", x), ("weight", weight.t() if weight.stride(1) != 1 else weight)):
        if matrix.numel() == 0:
            return f"{name} has no elements to describe"
        if matrix.stride(1) != 1:
            return f"{name} has strides {list(matrix.stride())}, and one of a descriptor's must be 1"
        if matrix.stride(0) * matrix.element_size() % 16 or matrix.data_ptr() % 16:
            return f"rows of {name} do not all start at a multiple of 16 bytes"
        if matrix.stride(0) < matrix.shape[1]:
            return f"rows of {name} overlap (stride {matrix.stride(0)} for {matrix.shape[1]} columns)"
    if not serves_ranks(arch, ranks):
        return f"the descriptor kernels take ranks that 16 divides, and these are {', '.join(map(str, ranks))}"
    return None


def tma_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    down: torch.Tensor | None,
    up: torch.Tensor,
    gate: torch.Tensor,
    kappa: torch.Tensor,
    scaling: float,
    s: torch.Tensor | None,
    *,
    ranks: tuple[int, int, int] | None,
    variant: str,
    tile: TileConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x @ weight.T + bias + scaling * (s * T_kappa(gate)) @ up.T, as `rank_lora_fwd` calls it.

    Args:
        x: [M, K]; weight: [N, K], or the transpose of a [K, N] in memory; rows at multiples of 16 bytes.
        down: [R, K]; not read where s is given. up: [N, R], or flat for packed projections.
        s: [M, R], or None: the kernel makes it.
    Returns:
        y: [M, N] and s.
    Raises:
        ValueError: descriptors cannot serve x or weight.
    """
    obstacle = why_not_tma(x, weight, ranks or (gate.shape[-1],))
    if obstacle:
        raise ValueError(f"the tile {tile} asks for descriptors, but {obstacle}. Use a tile without tma.")
    (m, k), n, r = x.shape, weight.shape[0], gate.shape[-1]
    widths: tuple[int, ...] = ranks or (r,)
    parts, aligned, along_n = len(widths), all(rank % 16 == 0 for rank in widths), weight.stride(1) != 1
    if variant == "split":
        assert s is not None
        block_r = tiles.rank_step(max(widths), *((s, up) if parts == 1 else (s,)), aligned=parts == 1 or aligned)
        down = x  # an operand that is not used is not read
    else:
        block_r = tiles.rank_block(max(widths))
        s = torch.empty((m, r), dtype=x.dtype, device=x.device)
    assert down is not None
    num_m, width = triton.cdiv(m, tile.block_m), n // parts
    programs = min(num_m * triton.cdiv(width, tile.block_n) * parts, common.multiprocessors(x))
    ready = torch.zeros((num_m, parts), dtype=torch.int32, device=x.device) if variant == "leader" else x
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    # a tile that reached into the next projection would overwrite it
    described_y = n * y.element_size() % 16 == 0 and (parts == 1 or width % tile.block_n == 0)

    def launch() -> None:
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=x.device))
        rank_lora_tma_kernel[(programs,)](
            x_ptr=x, weight_ptr=weight, bias_ptr=x if bias is None else bias.contiguous(), down_ptr=down, up_ptr=up,
            gate_ptr=gate.contiguous(), kappa_ptr=kappa, s_ptr=s, ready_ptr=ready, y_ptr=y,
            M=m, N=width, K=k, R=r, R0=widths[0], R1=widths[1] if parts == 3 else 0,
            rows_per_gate=m // gate.shape[0] if gate.dim() == 2 else 1, scaling=float(scaling),
            stride_xm=x.stride(0), stride_weight=weight.stride(1 if along_n else 0),
            stride_dr=down.stride(0), stride_dk=down.stride(1),
            stride_un=up.stride(0), stride_ur=up.stride(1) if parts == 1 else 1,
            stride_kappa=kappa.stride(0) if kappa.dim() else 0,
            VARIANT=variant, PARTS=parts, ALIGNED_RANKS=aligned, ROW_GATE=gate.dim() == 2, HAS_BIAS=bias is not None,
            WEIGHT_ALONG_N=along_n, DESCRIBED_Y=described_y,
            PRECISION=common.dot_precision(common.compute_type(x)),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BLOCK_R=block_r, GROUP_M=tile.group_m,
            **tile.launch,
        )  # fmt: skip

    with common.on_device(x):
        # in a copy of the context, where the allocator is a variable: the user's own stays what it is
        contextvars.copy_context().run(launch)
    return y, s


def compile_cases(arch: str, compute: str) -> Iterator[CompileCase]:
    """Every shipped config in each variant that uses it; packed projections as y, row gates as dx."""
    element, kernel = common.element_type(compute), rank_lora_tma_kernel
    operands = ("x_ptr", "weight_ptr", "bias_ptr", "down_ptr", "up_ptr", "s_ptr", "y_ptr")
    pointers = dict.fromkeys(operands, f"*{element}") | {"gate_ptr": "*fp32", "kappa_ptr": "*fp32"}
    y = {"WEIGHT_ALONG_N": False, "stride_dk": 1, "stride_ur": 1, "HAS_BIAS": True, "ROW_GATE": False}
    dx = {"WEIGHT_ALONG_N": True, "stride_dr": 1, "stride_un": 1, "HAS_BIAS": False, "PARTS": 1}
    roles = {
        "y": y | {"PARTS": 1, "DESCRIBED_Y": True},
        "packed": y | {"PARTS": 3, "stride_un": 1, "DESCRIBED_Y": True},
        "packed edge": y | {"PARTS": 3, "stride_un": 1, "DESCRIBED_Y": False},
        "dx": dx | {"ROW_GATE": False, "DESCRIBED_Y": True},
        "row gate": dx | {"ROW_GATE": True, "DESCRIBED_Y": True},
    }
    for variant in ("split", "one_pass", "leader"):
        kind = "tma_gemm" if variant == "split" else "tma_one_pass"
        for (size, tile), role in itertools.product(tiles.tile_configs(kind, compute, arch).items(), roles):
            rank = 16 if kind == "tma_one_pass" and size == "large" else 64
            blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "BLOCK_R": rank}
            flags = {"VARIANT": variant, "ALIGNED_RANKS": True, "GROUP_M": tile.group_m}
            ready = {"ready_ptr": "*i32" if variant == "leader" else f"*{element}"}
            constexprs = blocks | flags | {"PRECISION": common.dot_precision(compute)} | roles[role]
            yield CompileCase(kernel, f"tma {variant} {role} {size}", compute, rank, pointers | ready, constexprs, tile)
