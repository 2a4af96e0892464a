"""fastlora's op, one rival for each backend or variant that runs the call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastlora
from fastlora import ops
from rivals.case import Absent, Case, Operands

# what is tried by name; "auto" is what users get
VARIANTS = ("torch", "split", "one_pass", "leader", "split_tma", "one_pass_tma", "leader_tma", "merged")


def why_not(operands: Operands, variant: str) -> str | None:
    """The reason that `variant` cannot run these operands, or None."""
    gate = torch.cat([gate for _, _, gate in operands.adapters])
    lora_a, lora_b, _ = operands.adapters[0]
    call = (operands.xs[0], operands.weight, operands.bias, lora_a, lora_b, gate)
    try:
        fastlora.explain(*call, backend=variant)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return None


def build(operands: Operands, variant: str, adapter_dtype: torch.dtype | None = None) -> Case:
    """adapter_dtype: of lora_a and lora_b; by default that of x, float32 is what FusedRankLoRALinear holds."""
    reason = why_not(operands, variant)
    if reason:
        raise Absent(reason)
    dtype = adapter_dtype or operands.dtype
    adapters = [
        tuple(t.to(d, copy=True).requires_grad_() for t, d in zip(adapter, (dtype, dtype, torch.float32)))
        for adapter in operands.adapters
    ]
    weight, bias = operands.weight, operands.bias

    def one(x: Tensor) -> tuple[Tensor, ...]:
        return (ops.rank_lora_linear(x, weight, bias, *adapters[0], 0.0, 1.0, backend=variant),)

    def packed(x: Tensor) -> tuple[Tensor, ...]:
        lists = [list(each) for each in zip(*adapters)]
        return (ops.rank_lora_packed(x, weight, bias, *lists, [0.0] * 3, 1.0, backend=variant),)

    name = f"ours {variant}" + (" float32 adapters" if adapter_dtype == torch.float32 else "")
    return Case(name, operands, one if len(adapters) == 1 else packed, [t for a in adapters for t in a])


def build_module(operands: Operands, dropout: float = 0.0) -> Case:
    """FusedRankLoRALinear; with dropout its result is random, so it cannot be checked."""
    if operands.shape.parts > 1:
        raise Absent("a module holds one projection")
    layer = fastlora.FusedRankLoRALinear(
        operands.shape.k, operands.shape.n, operands.shape.r, dropout=dropout, device=operands.device
    ).train()
    layer.weight, layer.bias = (nn.Parameter(t, requires_grad=False) for t in (operands.weight, operands.bias))
    for parameter, value in zip((layer.lora_a, layer.lora_b, layer.gate), operands.adapters[0]):
        parameter.data.copy_(value)
    name = f"ours module dropout {dropout:g}" if dropout else "ours module"
    leaves = [layer.lora_a, layer.lora_b, layer.gate]
    return Case(name, operands, lambda x: (layer(x),), leaves, checked=dropout == 0)
