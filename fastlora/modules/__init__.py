"""Drop-in modules with a gated low-rank adapter."""

from __future__ import annotations

from fastlora.modules.adapter import RankAdapter
from fastlora.modules.attention import FusedRankLoRAAttention, FusedRankLoRAMultiheadAttention
from fastlora.modules.conv1d import FusedRankLoRAConv1D
from fastlora.modules.linear import FusedRankLoRALinear

__all__ = [
    "FusedRankLoRAAttention",
    "FusedRankLoRAConv1D",
    "FusedRankLoRALinear",
    "FusedRankLoRAMultiheadAttention",
    "RankAdapter",
]
