"""The ops that users call: the fused layer, the soft threshold, the in-place merge."""

from __future__ import annotations

from fastlora.ops.merge import MergeError, MergeReport, ModuleMerge, merge_, new_residuals, unmerge_
from fastlora.ops.prox import soft_threshold
from fastlora.ops.rank_lora import rank_lora_linear, rank_lora_packed

__all__ = [
    "MergeError",
    "MergeReport",
    "ModuleMerge",
    "merge_",
    "new_residuals",
    "rank_lora_linear",
    "rank_lora_packed",
    "soft_threshold",
    "unmerge_",
]
