"""Variant and tile of one call of the Triton kernels, from what was asked for, the dispatch table, and the operands."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from fastlora.ops import dispatch
from fastlora.ops.backend import TMA, TMA_VARIANTS
from fastlora.ops.rank_lora_torch import Ranks

if TYPE_CHECKING:
    from fastlora.triton_kernels import TileConfig


class Plan(NamedTuple):
    """variant: "library", "split", "one_pass" or "leader". tile: of the GEMM; None: the launcher's own rule picks."""

    variant: str
    tile: TileConfig | None
    reason: str


def make_plan(role: str, x: Tensor, weight: Tensor, r: int, ranks: Ranks, variant: str) -> Plan:
    """Plan of a forward (role "fwd", x [M, K]) or of dx (role "dx", x being dy [M, N]); weight [N, K] in both.

    variant: by name, or "triton", which asks the dispatch table. A tile of the table that reads by descriptors gives
    way to the launcher's own rule where the operands cannot be described.

    Raises:
        RuntimeError: descriptors were asked for by name for a forward that they cannot serve. A dx gives way: by then
            it is too late to choose.
    """
    widths = (ranks if role == "fwd" else None) or (r,)
    if variant in TMA_VARIANTS:
        return _by_descriptors(role, x, weight, widths, variant)
    if variant != "triton":
        return Plan(variant, None, "asked for by name")
    entry = dispatch.lookup_call(role, x, weight, r, ranks)
    tile = entry.tile_config
    if tile is None:
        return Plan(entry.variant, None, entry.reason)
    from fastlora.triton_kernels.common import rows_aligned

    if not rows_aligned(x, 1):
        return Plan(entry.variant, None, f"{entry.reason}; not its tile, which was measured on aligned rows")
    obstacle = _why_not_tma(role, x, weight, widths) if tile.tma else None
    if obstacle:
        return Plan(entry.variant, None, f"pointer kernel instead of the table's descriptors: {obstacle}")
    return Plan(entry.variant, tile, entry.reason)


def _by_descriptors(role: str, x: Tensor, weight: Tensor, ranks: tuple[int, ...], variant: str) -> Plan:
    from fastlora.triton_kernels.tiles import pick_tma_tile

    kind, obstacle = variant.removesuffix(TMA), _why_not_tma(role, x, weight, ranks)
    if obstacle and role == "fwd":
        raise RuntimeError(f'backend "{variant}" was asked for but {obstacle}. Pass backend="{kind}" or "auto".')
    if obstacle:
        return Plan(kind, None, f"pointer kernel instead of descriptors: {obstacle}")
    weight = weight if role == "fwd" else weight.t()
    return Plan(kind, pick_tma_tile(x, weight, kind, ranks), "asked for by name")


def _why_not_tma(role: str, x: Tensor, weight: Tensor, ranks: tuple[int, ...]) -> str | None:
    from fastlora.triton_kernels.rank_lora_tma import why_not_tma

    return why_not_tma(x, weight if role == "fwd" else weight.t(), ranks)
