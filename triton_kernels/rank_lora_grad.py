"""Gradients of lora_a, lora_b and the gate.

    dA' = p.T @ x    [R, K]        dlora_a = scaling * T(gate)[:, None] * dA'
    dB' = dy.T @ s   [N, R]        dlora_b = scaling * dB' * T(gate)[None, :]
    dgate_i = scaling * <lora_b[:, i], dB'[:, i]> * 1(gate_i alive: |gate_i| > kappa_i or kappa_i = 0)
             = scaling * <lora_a[i], dA'[i]> * 1(...)

with s = x @ lora_a.T and p = dy @ lora_b of the forward and dX; y as in `rank_lora_fwd.py` (CoDyRA, arXiv 2412.01004).
The gate needs no pass over the M rows: it is a dot of two matrices that are there already. Row gates [G, R], one row
for each M / G rows of x, multiply inside the sums over M instead, and dgate[g, i] sums p * s over the rows of g.

Launches: 3. (1) Sums over M in a fixed number of row ranges, each into its own partial buffer: `rank_grad_one_read.py`
or `rank_grad_columns.py`. (2) Partial buffers are added in order, scaled and stored, and each block of lora_b is
multiplied with its dB'. (3) Those products are added in order into dgate; row gates: p * s are. What is not needed is
neither computed nor read.

Numerics: float32 from the first product to the stored gradient, which is float32 whatever the dtype of x; s and p are
used as rounded to the dtype of x, and with row gates s * T(gate) * scaling (p too) is rounded once more for the dot.
No atomics; the number of row ranges depends on shapes and tile only, so two runs are bit-equal.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastlora.triton_kernels import common, rank_grad_columns, rank_grad_finish, rank_grad_one_read, tiles
from fastlora.triton_kernels.aot_cases import CompileCase
from fastlora.triton_kernels.rank_grad_finish import finish, row_gate
from fastlora.triton_kernels.rank_project import rank_project, rank_project_packed
from fastlora.triton_kernels.tiles import TileConfig


def grad_path(width: int, k: int, ranks: tuple[int, ...], element_size: int, tile: TileConfig | None) -> str:
    """Which kernel makes the sums over M where p has to be made too, projections `width` columns of dy each.

    "one_read", if there is a tile for it and the partial sums that it writes for each row block are fewer bytes than
    that block of dy, which "columns" reads once more to make p; else "columns".
    """
    if tile is None:
        return "columns"
    written = 4 * (width + k) * sum(ranks)
    return "one_read" if written < element_size * tile.block_m * width * len(ranks) else "columns"


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
    need_p: bool = False,
    *,
    ranks: tuple[int, int, int] | None = None,
    path: str | None = None,
    tile: TileConfig | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the adapter.

    The sums over M run as `grad_path` says: "one_read", if p is not given but needed (for dlora_a, need_p or the
    gradient of row gates) and reading dy again would cost more bytes than more partial sums, else "columns".

    Args:
        x: [M, K], dy: [M, N]: any strides. s: [M, R] of the forward, p = dy @ lora_b: [M, R]; None: computed here
            if needed.
        lora_a: [R, K], lora_b: [N, R], in the dtype of x. gate: [R] or [G, R], float32, M % G = 0.
        kappa: 0-d or [R], float32 on the device.
        need_a, need_b, need_gate: what is not needed is returned as None. The gate uses dB', or dA' if only lora_a
            is needed beside it; row gates use s and p.
        need_p: p is wanted (for `rank_lora_dx`); otherwise it may be returned as None.
        ranks: of three projections of N / 3 columns each, stacked in lora_a and gate [R]; lora_b is then flat: the
            three contiguous [N / 3, r] matrices one after the other.
        path: "one_read" (which makes p even if it is given) or "columns" instead of the rule.
        tile: of the kernel of either path, which a tile without block_k says to be "columns".
    Returns:
        dlora_a: [R, K], dlora_b: shape of lora_b, dgate: shape of gate; contiguous, float32. p: [M, R], dtype of dy.
    Numerics:
        See the module docstring.
    """
    (m, k), n, r, parts = x.shape, dy.shape[1], gate.shape[-1], ranks or (gate.shape[-1],)
    assert dy.shape == (m, n) and n % len(parts) == 0 and sum(parts) == r and lora_a.shape == (r, k)
    assert r <= common.MAX_RANK and max(m, n, k) <= common.MAX_SIDE
    assert lora_b.shape == ((n, r) if ranks is None else (n // 3 * r,)) and (ranks is None or lora_b.is_contiguous())
    assert gate.dim() == 1 or (gate.dim() == 2 and ranks is None and (m == 0 or m % gate.shape[0] == 0))
    assert x.dtype == dy.dtype == lora_a.dtype == lora_b.dtype and kappa.shape in ((), (r,))
    allocate = torch.zeros if min(m, n, k) == 0 else torch.empty  # a sum over nothing is zero
    wanted = ((need_a, (r, k)), (need_b, lora_b.shape), (need_gate, gate.shape))
    dlora_a, dlora_b, dgate = (
        allocate(shape, dtype=torch.float32, device=x.device) if need else None for need, shape in wanted
    )
    if min(m, n, k, r) == 0:
        p = _project(dy, lora_b, parts) if need_p and p is None else p
    elif need_a or need_b or need_gate or need_p:
        p = _launch_grad(
            x, s, dy, p, lora_a, lora_b, gate.contiguous(), kappa, float(scaling), parts, need_p, path, tile,
            dlora_a, dlora_b, dgate,
        )  # fmt: skip
    return dlora_a, dlora_b, dgate, p


def _project(dy: Tensor, lora_b: Tensor, ranks: tuple[int, ...]) -> Tensor:
    """p = dy @ lora_b."""
    return rank_project(dy, lora_b.t()) if lora_b.dim() == 2 else rank_project_packed(dy, lora_b, ranks)


def _launch_grad(
    x: Tensor, s: Tensor | None, dy: Tensor, p: Tensor | None, lora_a: Tensor, lora_b: Tensor, gate: Tensor,
    kappa: Tensor, scaling: float, ranks: tuple[int, ...], need_p: bool, path: str | None, tile: TileConfig | None,
    dlora_a: Tensor | None, dlora_b: Tensor | None, dgate: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """Fill the gradients that are not None; p, if it was made or given."""
    by_row = gate.dim() == 2 and dgate is not None
    sum_a = dlora_a is not None
    sum_b = dlora_b is not None or (dgate is not None and not by_row and not sum_a)
    if sum_b or by_row:
        s = rank_project(x, lora_a) if s is None else s.contiguous()
    store_p = need_p or by_row
    need_p = store_p or sum_a
    one_read_tile = tile if tile and tile.block_k else tiles.pick_one_read_tile(max(ranks), x, dy)
    if path is None and tile is not None:
        path = "one_read" if tile.block_k else "columns"
    elif path is None:
        width = dy.shape[1] // len(ranks)
        path = grad_path(width, x.shape[1], ranks, x.element_size(), one_read_tile if need_p and p is None else None)
    sums_s, partial_a, partial_b = s if sum_b else None, None, None
    if path == "one_read":
        assert one_read_tile is not None
        partial_a, partial_b, p = rank_grad_one_read.rank_grad_one_read(
            x, sums_s, dy, lora_b, gate, kappa, scaling, ranks, sum_a, store_p, one_read_tile
        )
    else:
        assert path == "columns", path
        if need_p:
            p = _project(dy, lora_b, ranks) if p is None else p.contiguous()
        if sum_a or sum_b:
            partial_a, partial_b = rank_grad_columns.rank_grad_columns(
                x, sums_s, dy, p if sum_a else None, gate, kappa, scaling, ranks, tile
            )
    if sum_a or sum_b:
        finish(partial_a, partial_b, lora_a, lora_b, gate, kappa, scaling, ranks, dlora_a, dlora_b, dgate)
    if by_row:
        assert p is not None and s is not None and dgate is not None
        row_gate(p, s, gate, kappa, scaling, dgate)
    return p


def compile_cases(arch: str, compute: str) -> Iterator[CompileCase]:
    """Every shipped config of the kernels of every launch."""
    for family in (rank_grad_one_read, rank_grad_columns, rank_grad_finish):
        yield from family.compile_cases(arch, compute)
