"""Which backends and variants exist, which one runs for a call, and why.

    torch    library  library GEMM, then the rank update added to its output: any device, any floating dtype
             merged   a GEMM over the merged weight, rounded to its dtype at every call: by name only, vector gates only
    triton   split, one_pass, leader  (triton_kernels/rank_lora_fwd.py): float16, bfloat16, float32, R <= 256
             the same with _tma       by tensor descriptors on sm_90 and newer (triton_kernels/rank_lora_tma.py)

The rule of backend="auto":

1. Triton when the tensors are on a CUDA or ROCm device whose Triton is installed, the dtype is float16, bfloat16 or
   float32, and the rank (of packed projections: their sum) is at most 256; which variant and tile, the dispatch table
   says for each call (`ops/dispatch.py`);
2. "library" otherwise.

"torch" and "triton" name a backend, the others in the two lists above a variant. What is asked for
by name runs or raises; "triton" is the dispatch table's choice, which for some calls is the library. Triton itself runs
its kernels on CPU tensors when TRITON_INTERPRET=1 was set before it was imported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TRITON_VARIANTS = ("split", "one_pass", "leader")
# a variant by descriptors, by name; in the dispatch table its tile says so
TMA = "_tma"
TMA_VARIANTS = tuple(f"{variant}{TMA}" for variant in TRITON_VARIANTS)
BACKENDS = ("torch", "triton", "library", "merged", *TRITON_VARIANTS, *TMA_VARIANTS)
TRITON_MAX_RANK = 256
# one-pass and leader hold all ranks of a projection in registers
ONE_PASS_MAX_RANK = 64
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Choice:
    """What runs a call, and why; str() is one line.

    Attributes:
        backend: "torch" or "triton".
        reason: a sentence.
        variant: as the module docstring lists them; "triton" where the dispatch table decides at each call.
        tile: of the GEMM, where it is known.
    """

    backend: str
    reason: str
    variant: str = "library"
    tile: str | None = None

    def __str__(self) -> str:
        name = self.backend if self.variant == self.backend else f"{self.backend} ({self.variant})"
        return f"{name}: {self.reason}" + (f"; tile {self.tile}" if self.tile else "")


# a fact of the installation, looked up without importing Triton
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, so that CPU tensors are legal for them."""
    if not TRITON_INSTALLED:
        return False
    from fastlora.triton_kernels.common import is_interpreted

    return is_interpreted()


def why_not_triton(device: torch.device, dtype: torch.dtype, gate_shape: Sequence[int]) -> str | None:
    """The reason that the Triton kernels cannot run a call, or None when they can."""
    if not TRITON_INSTALLED:
        return "Triton is not installed (pip install triton, Linux only)"
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return f"its kernels need a CUDA or ROCm device, and the tensors are on {device.type}"
    if dtype not in TRITON_DTYPES:
        return f"its kernels take float16, bfloat16 and float32, and x is {dtype}"
    if gate_shape[-1] > TRITON_MAX_RANK:
        return f"its kernels take ranks up to {TRITON_MAX_RANK}, and this one is {gate_shape[-1]}"
    return None


def variant_for(backend: str, x: Tensor, gate: Tensor, ranks: tuple[int, int, int] | None) -> str:
    """`choose(...).variant` at the price of a call; the usual one on a CPU needs no Choice."""
    if backend == "auto" and not x.is_cuda:
        return "library"
    return choose(backend, x.device, x.dtype, gate.shape, ranks).variant


def choose(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    gate_shape: Sequence[int],
    ranks: tuple[int, int, int] | None = None,
) -> Choice:
    """The variant for a call. ranks: of packed projections, whose gates are stacked.

    Raises:
        ValueError: unknown backend.
        RuntimeError: what was asked for by name cannot run this call; the message says why.
    """
    if backend == "auto" and device.type != "cuda":
        # answered without importing Triton, whose interpreter runs only when asked for by name
        return _NO_GPU.get(device.type) or _no_gpu(device.type)
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend {backend!r} is unknown; accepted: 'auto', {', '.join(map(repr, BACKENDS))}.")
    if backend in ("torch", "library"):
        return Choice("torch", "asked for by name")
    if backend == "merged":
        if len(gate_shape) == 2:
            raise RuntimeError(
                'backend "merged" was asked for but one merged weight cannot hold a gate of one row a sample or token. '
                'Pass backend="auto".'
            )
        return Choice("torch", "asked for by name; rounds the update into the weight's dtype at every call", "merged")
    obstacle = why_not_triton(device, dtype, gate_shape)
    if backend == "auto":
        if obstacle:
            return Choice("torch", f"Triton was passed over: {obstacle}")
        return Choice("triton", f"{dtype} on {device.type}; the dispatch table picks variant and tile", "triton")
    widest = max(ranks) if ranks else gate_shape[-1]
    if not obstacle and not backend.startswith(("split", "triton")) and widest > ONE_PASS_MAX_RANK:
        obstacle = f"it holds all ranks in registers, up to {ONE_PASS_MAX_RANK}, and this one has {widest}"
    if obstacle:
        raise RuntimeError(f'backend "{backend}" was asked for but {obstacle}. Pass backend="auto" or "torch".')
    return Choice("triton", "asked for by name", backend)


_NO_GPU: dict[str, Choice] = {}


def _no_gpu(device_type: str) -> Choice:
    reason = f"the tensors are on {device_type}; Triton's kernels need a CUDA or ROCm device"
    return _NO_GPU.setdefault(device_type, Choice("torch", reason))
