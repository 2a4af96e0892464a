"""Forward and dX of the gated rank-R update: the GEMM that adds the rank-R product to its accumulator.

    s  = x @ lora_a.T                                                                [M, R]
    y  = x @ weight.T + bias + scaling * (s * T_kappa(gate)) @ lora_b.T              [M, N]  (CoDyRA, arXiv 2412.01004)
    dx = dy @ weight + scaling * (p * T_kappa(gate)) @ lora_a,    p = dy @ lora_b    [M, K]

dx is the forward with weight, lora_a and lora_b read through other strides, so one kernel family serves both. Bias, soft
threshold, scaling and the rank-R product are fused. The variants differ in who makes s:

    split     `rank_project` does, before. 2 launches; reads x once more; any rank.
    one_pass  every tile does, beside its own product, and the first of each row block stores it. 1 launch; R more columns
              in every tile; ranks of a projection up to 64.
    leader    the first tile of each row block does, stores s and raises a flag that the others wait for in their
              epilogue. 1 launch (and one memset, of the flags); R more columns in one tile a row block; same ranks.

Nothing of size [M, N] is read or written twice; s is written once (M*R elements) and read once per column of tiles.

Packed projections (q, k and v of one weight): three projections of equal width, each with ranks of its own. A tile lies in
one projection and needs its ranks alone. Row gates: one row of gates for each M / G rows of x.

Numerics: every sum is float32. s is rounded once to the dtype of x and used as rounded, so that forward and backward
see one s. s * T(gate) * scaling is float32, rounded once to the dtype of x for the dot. y is rounded once.
Deterministic. NaN and inf travel as in PyTorch: a dead rank multiplies s by 0, it does not skip it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.triton_kernels import aot_cases, common, tiles
from fastlora.triton_kernels.aot_cases import CompileCase
from fastlora.triton_kernels.common import advance, dot, grouped_program, round_to, tile_ptrs
from fastlora.triton_kernels.epilogue import add_rank_product, add_rank_products, pass_flag
from fastlora.triton_kernels.rank_project import rank_project, rank_project_packed, ranks_of_part
from fastlora.triton_kernels.tiles import TileConfig

VARIANTS = ("split", "one_pass", "leader")


@triton.jit
def _k_loop(
    x_ptr, weight_ptr, down_ptr, K, offs_m, offs_n, offs_r, mask_m, mask_n, mask_r,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_dr, stride_dk,
    MAKE_S: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # x @ weight.T [BLOCK_M, BLOCK_N], and x @ down.T [BLOCK_M, BLOCK_R] if it makes s, else zeros
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = tile_ptrs(x_ptr, offs_m, stride_xm, offs_k, stride_xk)  # [BLOCK_M, BLOCK_K]
    w_ptrs = tile_ptrs(weight_ptr, offs_k, stride_wk, offs_n, stride_wn)  # [BLOCK_K, BLOCK_N]
    down_ptrs = tile_ptrs(down_ptr, offs_k, stride_dk, offs_r, stride_dr)  # [BLOCK_K, BLOCK_R]
    acc = tl.zeros((offs_m.shape[0], offs_n.shape[0]), dtype=tl.float32)
    acc_s = tl.zeros((offs_m.shape[0], offs_r.shape[0]), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_x, mask_w, mask_d = mask_m, mask_n, mask_r
        if not EVEN_K:
            mask_x &= offs_k[None, :] < K - k
            mask_w &= offs_k[:, None] < K - k
            mask_d &= offs_k[:, None] < K - k
        x = tl.load(x_ptrs, mask=mask_x, other=0.0)
        w = tl.load(w_ptrs, mask=mask_w, other=0.0)
        acc = dot(x, w, acc, PRECISION)
        if MAKE_S:
            down = tl.load(down_ptrs, mask=mask_d, other=0.0)
            acc_s = dot(x, down, acc_s, PRECISION)
            down_ptrs = advance(down_ptrs, BLOCK_K, stride_dk)
        x_ptrs = advance(x_ptrs, BLOCK_K, stride_xk)
        w_ptrs = advance(w_ptrs, BLOCK_K, stride_wk)
    return acc, acc_s


@triton.jit(do_not_specialize=["M", "R0", "R1", "rows_per_gate", "stride_kappa"])
def rank_lora_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, down_ptr, up_ptr, gate_ptr, kappa_ptr, s_ptr, ready_ptr, y_ptr,
    M, N, K, R, R0, R1, rows_per_gate, scaling,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_dr, stride_dk, stride_un, stride_ur, stride_kappa,
    VARIANT: tl.constexpr, PARTS: tl.constexpr, ALIGNED_RANKS: tl.constexpr, ROW_GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, STEP_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    # N: columns of one projection. Of packed ones, up is flat: a contiguous [N, rank] after the other
    # BLOCK_R: ranks held beside a K loop that makes s. STEP_R: ranks a step of the rank product of an s in memory
    num_n = tl.cdiv(N, BLOCK_N)
    rounds = 1  # known to the compiler, which removes the loop
    if VARIANT == "leader":
        # No deadlock: a tile waits only for one of a lower index (of a row block's tiles in a projection the leader has
        # the lowest), every program takes its tiles in increasing order, and all programs are resident, since there are
        # at most as many as multiprocessors. So the lowest unfinished tile is being worked on and waits for nothing.
        num_tiles = tl.cdiv(M, BLOCK_M) * num_n * PARTS
        rounds = tl.cdiv(num_tiles - tl.program_id(0), tl.num_programs(0))
    # a tile's addresses are made when it needs them: kept for the next tile they would take the registers of the K loop
    for i in tl.range(0, rounds, disable_licm=True):
        tile = tl.program_id(0) + i * tl.num_programs(0)
        pid_m, pid_n = grouped_program(tile, M, num_n * PARTS * BLOCK_N, BLOCK_M, BLOCK_N, GROUP_M)
        part, column = 0, pid_n
        if PARTS == 3:
            part, column = pid_n // num_n, pid_n % num_n
        offset, rank = ranks_of_part(part, R, R0, R1, PARTS, ALIGNED_RANKS)
        offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = column * BLOCK_N + tl.arange(0, BLOCK_N)  # within the projection
        offs_y = part * N + offs_n
        offs_r = tl.arange(0, BLOCK_R)
        mask_m = offs_m[:, None] < M
        mask_n = offs_n[None, :] < N
        mask_r = offs_r[None, :] < rank
        up_part, stride_up = up_ptr, stride_un
        if PARTS == 3:
            up_part, stride_up = up_ptr + tl.cast(N, tl.int64) * offset, rank

        if VARIANT == "one_pass" or VARIANT == "leader" and column == 0:
            acc, acc_s = _k_loop(
                x_ptr, weight_ptr, down_ptr, K, offs_m, offs_y, offset + offs_r, mask_m, mask_n, mask_r,
                stride_xm, stride_xk, stride_wn, stride_wk, stride_dr, stride_dk,
                True, EVEN_K, PRECISION, BLOCK_K,
            )  # fmt: skip
            # a rank past the last would be inf * 0 in a row that has an inf
            s = round_to(tl.where(mask_r, acc_s, 0.0), s_ptr.dtype.element_ty)
            if column == 0:
                tl.store(tile_ptrs(s_ptr + offset, offs_m, R, offs_r, 1), s, mask=mask_m & mask_r)
        else:
            acc, _ = _k_loop(
                x_ptr, weight_ptr, down_ptr, K, offs_m, offs_y, offset + offs_r, mask_m, mask_n, mask_r,
                stride_xm, stride_xk, stride_wn, stride_wk, stride_dr, stride_dk,
                False, EVEN_K, PRECISION, BLOCK_K,
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
                rows_per_gate, scaling, offs_m, offs_n, mask_m, mask_n, ROW_GATE, PRECISION, STEP_R,
            )  # fmt: skip
        if HAS_BIAS:
            acc += tl.load(bias_ptr + offs_y, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
        y = round_to(acc, y_ptr.dtype.element_ty)
        tl.store(tile_ptrs(y_ptr, offs_m, N * PARTS, offs_y, 1), y, mask=mask_m & mask_n)


def rank_lora_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    gate: torch.Tensor,
    kappa: torch.Tensor,
    scaling: float,
    *,
    ranks: tuple[int, int, int] | None = None,
    variant: str = "split",
    tile: TileConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Linear layer plus gated rank-R update.

    Args:
        x: [M, K], float32 / float16 / bfloat16, any strides.
        weight: [N, K]; bias: [N] or None; lora_a: [R, K]; lora_b: [N, R]; all in the dtype of x, any strides, R <= 256.
        gate: [R] or [G, R], float32; row m of x takes gate[m // (M // G)].
        kappa: 0-d or [R], float32, on the device of x; read there, never on the host.
        ranks: None, or of each of three packed projections of N / 3 columns; R is their sum. Then lora_a is stacked,
            lora_b is [N / 3 * R], the contiguous matrices [N / 3, rank] one after the other, and gate is [R].
        variant: who makes s, see the module docstring.
        tile: tile of the GEMM; by default `tiles.pick_gemm_tile` chooses.
    Returns:
        y: [M, N] and s = x @ lora_a.T: [M, R]; contiguous, dtype of x.
    Raises:
        RuntimeError: variant "one_pass" or "leader", and a projection has more than 64 ranks.
    Numerics:
        See the module docstring.
    """
    return _gated_gemm(x, weight, bias, lora_a, lora_b, gate, kappa, scaling, None, ranks, variant, tile)


def rank_lora_dx(
    dy: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    gate: torch.Tensor,
    kappa: torch.Tensor,
    scaling: float,
    *,
    ranks: tuple[int, int, int] | None = None,
    p: torch.Tensor | None = None,
    variant: str = "split",
    tile: TileConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of x: the forward kernels with weight -> weight.T, lora_a -> lora_b.T, lora_b -> lora_a.T.

    Args:
        dy: [M, N], dtype of weight, any strides. The others as in `rank_lora_fwd`.
        p: dy @ lora_b [M, R], contiguous, dtype of dy, if it is there already: then one launch, whatever the variant.
            Packed projections make it with `rank_project_packed`, whatever the variant: their p is no product of all of
            dy with one matrix.
    Returns:
        dx: [M, K] and p = dy @ lora_b: [M, R]; contiguous, dtype of dy.
    Raises:
        RuntimeError: p is not given, variant "one_pass" or "leader", and a projection has more than 64 ranks.
    """
    if p is None and ranks is not None:
        _refuse_many_ranks(variant, ranks)
        p = rank_project_packed(dy, lora_b, ranks)
    down = None if p is not None else lora_b.t()
    return _gated_gemm(dy, weight.t(), None, down, lora_a.t(), gate, kappa, scaling, p, None, variant, tile)


def _gated_gemm(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor | None, up: Tensor, gate: Tensor, kappa: Tensor,
    scaling: float, s: Tensor | None, ranks: tuple[int, int, int] | None, variant: str, tile: TileConfig | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x @ weight.T + bias + scaling * (s * T_kappa(gate)) @ up.T, and s = x @ down.T, made here or by the GEMM if None."""
    (m, k), n, r, widths = x.shape, weight.shape[0], gate.shape[-1], ranks or (gate.shape[-1],)
    assert weight.shape == (n, k) and weight.dtype == up.dtype == x.dtype and max(m, n, k) <= common.MAX_SIDE
    assert sum(widths) == r <= common.MAX_RANK and up.shape == ((n, r) if ranks is None else (n // 3 * r,))
    assert ranks is None or (len(ranks) == 3 and n % 3 == 0 and gate.dim() == 1 and up.is_contiguous())
    assert gate.dim() == 1 or m == 0 or m % gate.shape[0] == 0
    assert s is not None or (down is not None and down.shape == (r, k) and down.dtype == x.dtype)
    assert kappa.dim() == 0 or kappa.shape == (r,)
    if s is None:
        _refuse_many_ranks(variant, widths)
        if variant == "split" or 0 in (m, n, r):
            assert down is not None
            s = rank_project(x, down)
    assert s is None or (s.shape == (m, r) and s.is_contiguous() and s.dtype == x.dtype)
    if 0 in (m, n):
        assert s is not None
        return torch.empty((m, n), dtype=x.dtype, device=x.device), s
    variant = variant if s is None else "split"
    tile = tile or tiles.pick_gemm_tile(x, weight, variant, widths)
    gemm = _pointer_gemm
    if tile.tma:  # imported here: other tiles do not need it
        from fastlora.triton_kernels.rank_lora_tma import tma_gemm

        gemm = tma_gemm
    return gemm(x, weight, bias, down, up, gate, kappa, scaling, s, ranks=ranks, variant=variant, tile=tile)


def _refuse_many_ranks(variant: str, ranks: tuple[int, ...]) -> None:
    assert variant in VARIANTS
    if variant != "split" and max(ranks) > tiles.ONE_PASS_MAX_RANK:
        raise RuntimeError(
            f'variant "{variant}" was asked for with rank {max(ranks)}; it holds all ranks of a projection in registers, '
            f'at most {tiles.ONE_PASS_MAX_RANK}. Use variant="split".'
        )


def _pointer_gemm(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor | None, up: Tensor, gate: Tensor, kappa: Tensor,
    scaling: float, s: Tensor | None, *, ranks: tuple[int, int, int] | None, variant: str, tile: TileConfig,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`rank_lora_fwd_kernel`, for operands of any strides. s None: the kernel makes it; given: down is not read."""
    (m, k), n, r = x.shape, weight.shape[0], gate.shape[-1]
    widths: tuple[int, ...] = ranks or (r,)
    parts, aligned = len(widths), all(rank % 16 == 0 for rank in widths)
    block_r = 16
    if variant == "split":
        down = x  # an operand that is not used is not read
    else:
        block_r = tiles.rank_block(max(widths))
        s = torch.empty((m, r), dtype=x.dtype, device=x.device)
    assert s is not None and down is not None
    step_r = tiles.rank_step(max(widths), *((s, up) if parts == 1 else (s,)), aligned=parts == 1 or aligned)
    num_m, num_n = triton.cdiv(m, tile.block_m), triton.cdiv(n // parts, tile.block_n) * parts
    programs, ready = num_m * num_n, x
    if variant == "leader":
        programs = min(programs, common.multiprocessors(x))
        ready = torch.zeros((num_m, parts), dtype=torch.int32, device=x.device)
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    with common.on_device(x):
        rank_lora_fwd_kernel[(programs,)](
            x_ptr=x, weight_ptr=weight, bias_ptr=x if bias is None else bias.contiguous(), down_ptr=down, up_ptr=up,
            gate_ptr=gate.contiguous(), kappa_ptr=kappa, s_ptr=s, ready_ptr=ready, y_ptr=y,
            M=m, N=n // parts, K=k, R=r, R0=widths[0], R1=widths[1] if parts == 3 else 0,
            rows_per_gate=m // gate.shape[0] if gate.dim() == 2 else 1, scaling=float(scaling),
            stride_xm=x.stride(0), stride_xk=x.stride(1), stride_wn=weight.stride(0), stride_wk=weight.stride(1),
            stride_dr=down.stride(0), stride_dk=down.stride(1),
            stride_un=up.stride(0), stride_ur=up.stride(1) if parts == 1 else 1,
            stride_kappa=kappa.stride(0) if kappa.dim() else 0,
            VARIANT=variant, PARTS=parts, ALIGNED_RANKS=aligned, ROW_GATE=gate.dim() == 2, HAS_BIAS=bias is not None,
            EVEN_K=k % tile.block_k == 0, PRECISION=common.dot_precision(common.compute_type(x)),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BLOCK_R=block_r, STEP_R=step_r,
            GROUP_M=tile.group_m, **tile.launch,
        )  # fmt: skip
    return y, s


def compile_cases(arch: str, compute: str) -> Iterator[CompileCase]:
    """Every shipped config in each variant that uses it, operands contiguous as forward (y) and dX (dx) read them.

    Packed projections only as y, where they have the most to do; row gates only as dx. The variants that hold all ranks
    do so for 16, in every size, and for 64 that are read one element at a time, but in "large", which is for 16 only.
    """
    element, kernel = common.element_type(compute), rank_lora_fwd_kernel
    operands = ("x_ptr", "weight_ptr", "bias_ptr", "down_ptr", "up_ptr", "s_ptr", "y_ptr")
    pointers = dict.fromkeys(operands, f"*{element}") | {"gate_ptr": "*fp32", "kappa_ptr": "*fp32"}
    everything = tuple(kernel.arg_names)
    y, dx = {"stride_wk": 1, "stride_dk": 1, "stride_ur": 1}, {"stride_wn": 1, "stride_dr": 1, "stride_un": 1}
    roles = {
        "y": y | {"HAS_BIAS": True, "PARTS": 1, "ROW_GATE": False},
        "packed": y | {"HAS_BIAS": True, "PARTS": 3, "ROW_GATE": False, "stride_un": 1},
        "dx": dx | {"HAS_BIAS": False, "PARTS": 1, "ROW_GATE": False},
        "row gate": dx | {"HAS_BIAS": False, "PARTS": 1, "ROW_GATE": True},
    }

    def case(variant: str, role: str, size: str, tile: TileConfig, r: int, odd: tuple[str, ...]) -> CompileCase:
        flags: dict[str, int | bool | str] = {"VARIANT": variant, "stride_xk": 1}
        flags |= {"EVEN_K": not odd, "ALIGNED_RANKS": not odd}
        flags |= {"BLOCK_R": 16 if variant == "split" else r, "STEP_R": 16 if odd else r}
        blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP_M": tile.group_m}
        constexprs = flags | blocks | {"PRECISION": common.dot_precision(compute)} | roles[role]
        ready = {"ready_ptr": "*i32" if variant == "leader" else f"*{element}"}
        return CompileCase(kernel, f"{variant} {role} {size}", compute, r, pointers | ready, constexprs, tile, odd)

    wide = 16 if element == "fp32" else 64
    for size, tile in tiles.tile_configs("gemm", compute, arch).items():
        odd = everything if size == "ragged" else aot_cases.ODD_RANK
        yield case("split", "packed", size, tile, 16, odd)
        yield case("split", "dx", size, tile, 16, odd)
        if size != "ragged":
            yield case("split", "y", size, tile, 16, ())
            yield case("split", "y", size, tile, wide, ())
            yield case("split", "row gate", size, tile, wide, ())
    for size, tile in tiles.tile_configs("one_pass", compute, arch).items():
        if size != "ragged":
            yield case("one_pass", "y", size, tile, 16, ())
            yield case("leader", "packed", size, tile, 16, ())
            yield case("leader", "row gate", size, tile, 16, ())
        if size != "large":
            odd = everything if size == "ragged" else aot_cases.ODD_RANK
            yield case("one_pass", "y", size, tile, 64, odd)
            yield case("one_pass", "row gate", size, tile, 64, odd)
            yield case("leader", "packed", size, tile, 64, odd)
            yield case("leader", "dx", size, tile, 64, odd)
