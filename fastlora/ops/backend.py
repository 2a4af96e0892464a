"""Which backends exist, which one runs for a call, and why.

The rule of backend="auto":

1. "triton" when the tensors are on a CUDA or ROCm device whose Triton is installed, the dtype is float16, bfloat16 or
   float32, and the gate is one vector [R] with R <= 256;
2. "torch" otherwise.

A backend asked for by name runs or raises. Nothing is read from the environment, except that Triton itself runs its
kernels on CPU tensors when TRITON_INTERPRET=1 was set before it was imported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BACKENDS = ("torch", "triton")
TRITON_MAX_RANK = 256
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Choice:
    """The backend that runs a call, and the sentence that says why."""

    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.backend}: {self.reason}"


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
    if len(gate_shape) == 2:
        return "its kernels take a gate of shape [R], and this gate has one row a sample or token"
    return None


def choose(backend: str, device: torch.device, dtype: torch.dtype, gate_shape: Sequence[int]) -> Choice:
    """The backend for a call.

    Raises:
        ValueError: unknown backend.
        RuntimeError: a backend asked for by name cannot run this call; the message says why.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend {backend!r} is unknown; accepted: 'auto', {', '.join(map(repr, BACKENDS))}.")
    if backend == "torch":
        return Choice("torch", "asked for by name")
    if backend == "auto" and device.type != "cuda":
        # answered without importing Triton, whose interpreter runs only when asked for by name
        return Choice("torch", f"the tensors are on {device.type}; Triton's kernels need a CUDA or ROCm device")
    obstacle = why_not_triton(device, dtype, gate_shape)
    if backend == "triton":
        if obstacle:
            raise RuntimeError(f'backend "triton" was asked for but {obstacle}. Pass backend="auto" or "torch".')
        return Choice("triton", "asked for by name")
    if obstacle:
        return Choice("torch", f"Triton was passed over: {obstacle}")
    return Choice("triton", f"{dtype} on {device.type}, split variant; not tuned on this device")


def explain(
    layer_or_x: nn.Module | Tensor, *call_args: object, gate: Tensor | None = None, backend: str | None = None
) -> Choice:
    """Which backend runs a layer, or a call of `rank_lora_linear`, and why.

        fastlora.explain(layer)                                     as the layer would run on inputs of its weight's dtype
        fastlora.explain(x, weight, bias, lora_a, lora_b, gate)     as the op would run

    Args:
        layer_or_x: an adapted layer, or the op's `x` followed by its other operands.
        backend: as for the op; a layer brings its own.
    Returns:
        Choice: `.backend`, `.reason`; str() is one line.
    Raises:
        TypeError: neither a layer with an adapter nor a tensor.
        RuntimeError: the backend asked for by name cannot run here.
    """
    if isinstance(layer_or_x, nn.Module):
        missing = [name for name in ("weight", "gate", "backend") if not hasattr(layer_or_x, name)]
        if missing:
            raise TypeError(
                f"a {type(layer_or_x).__name__} has no {', '.join(missing)}; pass a FusedRankLoRALinear, one of "
                "fastlora.adapters(model), or the operands of rank_lora_linear."
            )
        weight = layer_or_x.weight
        choice = choose(backend or layer_or_x.backend, weight.device, weight.dtype, layer_or_x.gate.shape)
        if layer_or_x.training and getattr(layer_or_x, "dropout", 0) > 0:
            return Choice("torch", "dropout is on: base and update have different inputs, so nothing is fused")
        return choice
    if not isinstance(layer_or_x, Tensor):
        raise TypeError(
            f"a {type(layer_or_x).__name__} was given; a layer or the operands of rank_lora_linear are accepted."
        )
    gate = call_args[4] if gate is None and len(call_args) > 4 else gate
    gate_shape = gate.shape if isinstance(gate, Tensor) else (0,)
    return choose(backend or "auto", layer_or_x.device, layer_or_x.dtype, gate_shape)
