"""`fastlora.explain`: what runs a layer or a call, and why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fastlora.ops.backend import Choice, choose
from fastlora.ops.plan import make_plan


def explain(layer_or_x: nn.Module | Tensor, *operands: Tensor | None, backend: str | None = None) -> Choice:
    """Which backend, variant and tile run a layer, or a call of `rank_lora_linear`, and why.

        fastlora.explain(layer)                                     as the layer would run on inputs of its weight's dtype
        fastlora.explain(layer, x)                                  on this input: variant and tile depend on its rows
        fastlora.explain(x, weight, bias, lora_a, lora_b, gate)     as the op would run

    Args:
        layer_or_x: an adapted layer, or the op's `x`.
        operands: with a layer, an input [..., K] or nothing; with `x`, the op's other five operands.
        backend: as for the op; a layer brings its own.
    Returns:
        A `fastlora.ops.backend.Choice` with backend, variant, tile and reason; str() is one line.
    Raises:
        TypeError: neither a layer with an adapter nor a tensor, or not all operands of the op.
        RuntimeError: what was asked for by name cannot run here.
    """
    if isinstance(layer_or_x, nn.Module):
        return _explain_layer(layer_or_x, operands[0] if operands else None, backend)
    if not isinstance(layer_or_x, Tensor):
        raise TypeError(
            f"a {type(layer_or_x).__name__} was given; a layer or the operands of rank_lora_linear are accepted."
        )
    if len(operands) != 5:
        raise TypeError(
            f"{1 + len(operands)} operands were given; explain takes all six of the op, or a layer: "
            "x, weight, bias, lora_a, lora_b, gate."
        )
    weight, _, _, _, gate = operands
    if weight is None or gate is None:
        raise TypeError("weight or gate is None; only bias may be: x, weight, bias, lora_a, lora_b, gate.")
    return _explain_call(backend or "auto", layer_or_x, weight, gate)


def _explain_layer(layer: nn.Module, x: Tensor | None, backend: str | None) -> Choice:
    missing = [name for name in ("weight", "gate", "backend") if not hasattr(layer, name)]
    if missing:
        raise TypeError(
            f"a {type(layer).__name__} has no {', '.join(missing)}; pass a FusedRankLoRALinear, one of "
            "fastlora.adapters(model), or the operands of rank_lora_linear."
        )
    found: Any = layer  # nn.Module promises none of the three
    if layer.training and getattr(layer, "dropout", 0) > 0:
        return Choice("torch", "dropout is on: base and update have different inputs, so nothing is fused")
    named: str = backend or found.backend
    if x is not None:
        return _explain_call(named, x, found.weight, found.gate)
    choice = choose(named, found.weight.device, found.weight.dtype, found.gate.shape)
    if choice.variant == "triton":
        return replace(choice, reason=f"{choice.reason}; pass an input as well to see which")
    return choice


def _explain_call(backend: str, x: Tensor, weight: Tensor, gate: Tensor) -> Choice:
    choice = choose(backend, x.device, x.dtype, gate.shape)
    if choice.backend != "triton":
        return choice
    from fastlora.triton_kernels.tiles import pick_gemm_tile

    rows = x.reshape(-1, x.shape[-1])
    plan = make_plan("fwd", rows, weight, gate.shape[-1], None, choice.variant)
    if plan.variant == "library":
        return Choice("torch", plan.reason)
    tile = plan.tile or pick_gemm_tile(rows, weight, plan.variant, (gate.shape[-1],))
    return Choice("triton", plan.reason, plan.variant, str(tile))
