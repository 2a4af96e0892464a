"""Drop-in modules with a gated low-rank adapter."""

from __future__ import annotations

from fastlora.modules.adapter import RankAdapter
from fastlora.modules.attention import FusedRankLoRAAttention, FusedRankLoRAMultiheadAttention
from fastlora.modules.linear import FusedRankLoRALinear

__all__ = ["FusedRankLoRAAttention", "FusedRankLoRALinear", "FusedRankLoRAMultiheadAttention", "RankAdapter"]
