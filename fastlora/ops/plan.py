"""Variant and tile of one call of the Triton kernels, from what was asked for, the dispatch table, and the operands."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from fastlora.ops import dispatch
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
    """
    if variant != "triton":
        return Plan(variant, None, "asked for by name")
    entry = dispatch.lookup_call(role, x, weight, r, ranks)
    tile = entry.tile_config
    if tile is None:
        return Plan(entry.variant, None, entry.reason)
    from fastlora.triton_kernels.common import rows_aligned

    if not rows_aligned(x, 1):
        return Plan(entry.variant, None, f"{entry.reason}; not its tile, which was measured on aligned rows")
    if not tile.tma:
        return Plan(entry.variant, tile, entry.reason)
    from fastlora.triton_kernels.rank_lora_tma import why_not_tma

    obstacle = why_not_tma(x, weight if role == "fwd" else weight.t())
    if obstacle is None:
        return Plan(entry.variant, tile, entry.reason)
    return Plan(entry.variant, None, f"pointer kernel instead of the table's descriptors: {obstacle}")
