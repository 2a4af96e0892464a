"""Forward and dX of the gated rank-R update, split variant.

    s  = x @ lora_a.T                                                                [M, R]
    y  = x @ weight.T + bias + scaling * (s * T_kappa(gate)) @ lora_b.T              [M, N]  (CoDyRA, arXiv 2412.01004)
    dx = dy @ weight + scaling * (p * T_kappa(gate)) @ lora_a,    p = dy @ lora_b    [M, K]

dx is the forward with weight, lora_a and lora_b read through other strides, so one kernel family serves both.

Fused: bias, soft threshold, scaling and the rank-R product, which the GEMM adds to its accumulator as one more dot.
Launches: 2 (s, then y). Elements moved beyond a plain GEMM: x once more (M*K), s written (M*R) and read once per
column of tiles; nothing of size [M, N] is read or written twice.

Numerics: every sum is float32. s is rounded once to the dtype of x and used as rounded, so that forward and backward
see one s. s * T(gate) * scaling is float32, rounded once to the dtype of x for the dot. y is rounded once.
Deterministic. NaN and inf travel as in PyTorch: a dead rank multiplies s by 0, it does not skip it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from fastlora.triton_kernels import aot_cases, common, tiles
from fastlora.triton_kernels.aot_cases import CompileCase
from fastlora.triton_kernels.common import (
    advance,
    dot,
    grouped_program,
    round_to,
    soft_threshold,
    tile_ptrs,
)
from fastlora.triton_kernels.tiles import TileConfig


@triton.jit(do_not_specialize=["M"])
def rank_project_kernel(
    x_ptr, down_ptr, s_ptr,
    M, K, R,
    stride_xm, stride_xk, stride_dr, stride_dk,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m = offs_m[:, None] < M
    mask_r = offs_r[None, :] < R
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
    tl.store(tile_ptrs(s_ptr, offs_m, R, offs_r, 1), s, mask=mask_m & mask_r)


@triton.jit(do_not_specialize=["M"])
def rank_lora_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, s_ptr, up_ptr, gate_ptr, kappa_ptr, y_ptr,
    M, N, K, R, scaling,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_un, stride_ur,
    HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = grouped_program(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m[:, None] < M
    mask_n = offs_n[None, :] < N
    x_ptrs = tile_ptrs(x_ptr, offs_m, stride_xm, offs_k, stride_xk)  # [BLOCK_M, BLOCK_K]
    w_ptrs = tile_ptrs(weight_ptr, offs_k, stride_wk, offs_n, stride_wn)  # [BLOCK_K, BLOCK_N]

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_x, mask_w = mask_m, mask_n
        if not EVEN_K:
            mask_x &= offs_k[None, :] < K - k
            mask_w &= offs_k[:, None] < K - k
        x = tl.load(x_ptrs, mask=mask_x, other=0.0)
        w = tl.load(w_ptrs, mask=mask_w, other=0.0)
        acc = dot(x, w, acc, PRECISION)
        x_ptrs = advance(x_ptrs, BLOCK_K, stride_xk)
        w_ptrs = advance(w_ptrs, BLOCK_K, stride_wk)

    acc = _add_rank_product(
        acc, s_ptr, up_ptr, gate_ptr, kappa_ptr, scaling, R, stride_un, stride_ur,
        offs_m, offs_n, mask_m, mask_n, PRECISION, BLOCK_R,
    )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    y = round_to(acc, y_ptr.dtype.element_ty)
    tl.store(tile_ptrs(y_ptr, offs_m, N, offs_n, 1), y, mask=mask_m & mask_n)


@triton.jit
def _add_rank_product(
    acc, s_ptr, up_ptr, gate_ptr, kappa_ptr, scaling, R, stride_un, stride_ur,
    offs_m, offs_n, mask_m, mask_n, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # acc + scaling * (s * T(gate)) @ up.T, BLOCK_R ranks a step; no step at all for R = 0  # [BLOCK_M, BLOCK_N]
    kappa = tl.load(kappa_ptr).to(tl.float32)
    # one stage: buffers of this short loop would come on top of those of the K loop
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        gate = tl.load(gate_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)
        s = tl.load(tile_ptrs(s_ptr, offs_m, R, offs_r, 1), mask=mask_m & mask_r[None, :], other=0.0)
        up = tl.load(tile_ptrs(up_ptr, offs_r, stride_ur, offs_n, stride_un), mask=mask_r[:, None] & mask_n, other=0.0)
        gated = s.to(tl.float32) * (soft_threshold(gate, kappa) * scaling)[None, :]  # [BLOCK_M, BLOCK_R]
        acc = dot(round_to(gated, up.dtype), up, acc, PRECISION)
    return acc


def rank_project(x: torch.Tensor, down: torch.Tensor, tile: TileConfig | None = None) -> torch.Tensor:
    """Project rows onto the ranks: `x @ down.T`.

    Args:
        x: [M, K], any strides.
        down: [R, K], dtype of x, any strides; R <= 256.
    Returns:
        s: [M, R] contiguous, dtype of x. Accumulated in float32, rounded once.
    """
    (m, k), r = x.shape, down.shape[0]
    assert down.shape == (r, k) and down.dtype == x.dtype
    assert r <= common.MAX_RANK and max(m, k) <= common.MAX_SIDE
    s = torch.empty((m, r), dtype=x.dtype, device=x.device)
    if s.numel() == 0:
        return s
    tile = tile or tiles.pick_rank_tile("project", r, x)
    with common.on_device(x):
        rank_project_kernel[(triton.cdiv(m, tile.block_m),)](
            x_ptr=x, down_ptr=down, s_ptr=s, M=m, K=k, R=r,
            stride_xm=x.stride(0), stride_xk=x.stride(1), stride_dr=down.stride(0), stride_dk=down.stride(1),
            EVEN_K=k % tile.block_k == 0, PRECISION=common.dot_precision(common.compute_type(x)),
            BLOCK_M=tile.block_m, BLOCK_K=tile.block_k, BLOCK_R=tiles.rank_block(r), **tile.launch,
        )  # fmt: skip
    return s


def rank_lora_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    gate: torch.Tensor,
    kappa: torch.Tensor,
    scaling: float,
    tile: TileConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Linear layer plus gated rank-R update.

    Args:
        x: [M, K], float32 / float16 / bfloat16, any strides.
        weight: [N, K]; bias: [N] or None; lora_a: [R, K]; lora_b: [N, R]; all in the dtype of x, any strides, R <= 256.
        gate: [R], float32. kappa: 0-d float32 on the device of x; read there, never on the host.
        tile: tile of the GEMM; by default `tiles.pick_gemm_tile` chooses.
    Returns:
        y: [M, N] and s = x @ lora_a.T: [M, R]; contiguous, dtype of x.
    Numerics:
        See the module docstring.
    """
    s = rank_project(x, lora_a)
    return _gated_gemm(x, weight, bias, s, lora_b, gate, kappa, scaling, tile), s


def rank_lora_dx(
    dy: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    gate: torch.Tensor,
    kappa: torch.Tensor,
    scaling: float,
    tile: TileConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of x: the forward kernels with weight -> weight.T, lora_a -> lora_b.T, lora_b -> lora_a.T.

    Args:
        dy: [M, N], dtype of weight, any strides. The others as in `rank_lora_fwd`.
    Returns:
        dx: [M, K] and p = dy @ lora_b: [M, R]; contiguous, dtype of dy.
    """
    p = rank_project(dy, lora_b.t())
    return _gated_gemm(dy, weight.t(), None, p, lora_a.t(), gate, kappa, scaling, tile), p


def _gated_gemm(x, weight, bias, s, up, gate, kappa, scaling, tile):
    """x @ weight.T + bias + scaling * (s * T_kappa(gate)) @ up.T; weight: [N, K], up: [N, R]."""
    (m, k), n, r = x.shape, weight.shape[0], s.shape[1]
    assert weight.shape == (n, k) and s.shape == (m, r) and up.shape == (n, r) and gate.shape == (r,)
    assert weight.dtype == up.dtype == s.dtype == x.dtype and kappa.dim() == 0 and max(m, n, k) <= common.MAX_SIDE
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    tile = tile or tiles.pick_gemm_tile(x, weight)
    with common.on_device(x):
        rank_lora_fwd_kernel[(triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)](
            x_ptr=x, weight_ptr=weight, bias_ptr=x if bias is None else bias.contiguous(), s_ptr=s, up_ptr=up,
            gate_ptr=gate.contiguous(), kappa_ptr=kappa, y_ptr=y, M=m, N=n, K=k, R=r, scaling=float(scaling),
            stride_xm=x.stride(0), stride_xk=x.stride(1), stride_wn=weight.stride(0), stride_wk=weight.stride(1),
            stride_un=up.stride(0), stride_ur=up.stride(1),
            HAS_BIAS=bias is not None, EVEN_K=k % tile.block_k == 0,
            PRECISION=common.dot_precision(common.compute_type(x)),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            BLOCK_R=tiles.rank_step(r, s, up), GROUP_M=tile.group_m, **tile.launch,
        )  # fmt: skip
    return y


def compile_cases(arch: str, compute: str) -> Iterator[CompileCase]:
    """Every shipped config of the two kernels in both roles, operands contiguous as forward and dX read them."""
    element, dot_type = common.element_type(compute), {"PRECISION": common.dot_precision(compute), "stride_xk": 1}
    kernel, pointers = rank_project_kernel, dict.fromkeys(("x_ptr", "down_ptr", "s_ptr"), f"*{element}")
    for size, tile in tiles.tile_configs("project", compute, arch).items():
        blocks = dot_type | {"BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k}
        roles = (("s", "stride_dk"), ("p", "stride_dr"))
        for (r, odd), (role, unit) in itertools.product(aot_cases.rank_cases(size, kernel), roles):
            constexprs = blocks | {"BLOCK_R": r, "EVEN_K": not odd, unit: 1}
            yield CompileCase(kernel, f"project {role} {size}", compute, r, pointers, constexprs, tile, odd)

    operands = ("x_ptr", "weight_ptr", "bias_ptr", "s_ptr", "up_ptr", "y_ptr")
    kernel, pointers = rank_lora_fwd_kernel, dict.fromkeys(operands, f"*{element}")
    pointers |= {"gate_ptr": "*fp32", "kappa_ptr": "*fp32"}
    for size, tile in tiles.tile_configs("gemm", compute, arch).items():
        blocks = dot_type | {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
        aligned = ((16, ()), (16, aot_cases.ODD_RANK)) + (((64, ()),) if element != "fp32" else ())
        steps = ((16, tuple(kernel.arg_names)),) if size == "ragged" else aligned
        roles = (("y", {"stride_wk": 1, "stride_ur": 1}), ("dx", {"stride_wn": 1, "stride_un": 1}))
        for (r, odd), (role, units) in itertools.product(steps, roles):
            flags = {"BLOCK_R": r, "EVEN_K": not odd, "HAS_BIAS": role == "y", "GROUP_M": tile.group_m}
            constexprs = blocks | flags | units
            yield CompileCase(kernel, f"gemm {role} {size}", compute, r, pointers, constexprs, tile, odd)
