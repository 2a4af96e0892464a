"""Triton kernels of the fused rank-R update. Tensors in, tensors out; nothing here knows of autograd.

Imports torch and triton only. Under `TRITON_INTERPRET=1`, set before Triton is imported, the same kernels run on CPU
tensors (`is_interpreted()`).
"""

from fastlora.triton_kernels.common import MAX_RANK, is_interpreted
from fastlora.triton_kernels.rank_lora_fwd import rank_lora_dx, rank_lora_fwd
from fastlora.triton_kernels.rank_lora_grad import rank_lora_grad
from fastlora.triton_kernels.rank_project import rank_project, rank_project_packed
from fastlora.triton_kernels.tiles import TileConfig

__all__ = [
    "MAX_RANK",
    "TileConfig",
    "is_interpreted",
    "rank_lora_dx",
    "rank_lora_fwd",
    "rank_lora_grad",
    "rank_project",
    "rank_project_packed",
]
