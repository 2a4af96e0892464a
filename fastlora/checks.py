"""Argument checks of the ops and the modules; their error texts are born here.

Each message says what was given, what is accepted, and what to do.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastlora.reference import OPERATORS

GATE_INITS = ("normal", "ones")


def check_operator(operator: str) -> None:
    if operator not in OPERATORS:
        raise ValueError(f"operator {operator!r} is unknown; accepted: {', '.join(map(repr, OPERATORS))}.")


def check_kappa(kappa: float | Tensor) -> None:
    """A float is checked; a tensor is trusted, since reading it would wait for the device."""
    if isinstance(kappa, Tensor):
        if kappa.numel() != 1:
            raise ValueError(f"kappa has shape {list(kappa.shape)}; it must be a float or a 0-d tensor.")
        return
    if isinstance(kappa, bool) or not isinstance(kappa, (int, float)):
        raise TypeError(f"kappa is a {type(kappa).__name__}; it must be a float or a 0-d tensor.")
    if not (math.isfinite(kappa) and kappa >= 0):
        raise ValueError(
            f"kappa is {kappa}; it must be finite and >= 0 (a negative kappa grows the gates, an infinite one makes NaN). "
            "Use kappa=0.0 to switch the threshold off."
        )


def check_scaling(scaling: float) -> None:
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        raise TypeError(f"scaling is a {type(scaling).__name__}; it must be a float.")
    if not math.isfinite(scaling):
        raise ValueError(f"scaling is {scaling}; it must be finite.")


def check_layer_options(rank: int, kappa: float, scaling: float, dropout: float, gate_init: str) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank is a {type(rank).__name__}; it must be an int >= 1.")
    if rank < 1:
        raise ValueError(f"rank is {rank}; it must be >= 1 when a layer is built (pruning may bring it to 0 later).")
    if isinstance(kappa, Tensor):
        raise TypeError("kappa of a layer must be a float; set layer.kappa to change it.")
    check_kappa(kappa)
    check_scaling(scaling)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}; it must be in [0, 1).")
    if gate_init not in GATE_INITS:
        raise ValueError(f"gate_init {gate_init!r} is unknown; accepted: {', '.join(map(repr, GATE_INITS))}.")


def check_finite_gate(gate: Tensor, name: str = "gate") -> None:
    """Pruning and merging decide by |gate| > kappa, which a NaN fails: it would vanish without a word."""
    bad = int((~torch.isfinite(gate)).sum())
    if bad:
        raise ValueError(
            f"{name} holds {bad} non-finite of {gate.numel()} values; it must be finite to prune or merge. "
            "Restore the adapter from its last good checkpoint, or call reset_adapter_()."
        )


def check_tensors(**operands: Any) -> None:
    """Each operand is a tensor; `bias` may be None."""
    for name, tensor in operands.items():
        if not isinstance(tensor, Tensor) and not (name == "bias" and tensor is None):
            raise TypeError(f"{name} is a {type(tensor).__name__}; it must be a torch.Tensor.")


def check_rank_lora(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, gate: Tensor
) -> None:
    """Check shapes, dtypes and devices of a call of `rank_lora_linear`.

    Raises:
        TypeError: a dtype does not fit. ValueError: a shape or a device does not fit.
    """
    tensors = {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b, "gate": gate}
    if bias is not None:
        tensors["bias"] = bias
    _check_shapes(x, weight, bias, lora_a, lora_b, gate)
    _check_dtypes(tensors)
    for name, tensor in tensors.items():
        if tensor.device != x.device:
            raise ValueError(
                f"{name} is on {tensor.device} and x is on {x.device}; all operands must share a device. "
                "Move the module with .to(x.device), or the input to the module's device."
            )


def _check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, gate: Tensor) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {list(weight.shape)}; it must be [N, K].")
    n, k = weight.shape
    if x.dim() < 1 or x.shape[-1] != k:
        raise ValueError(
            f"x has shape {list(x.shape)}; with weight {[n, k]} it must be [..., {k}]. "
            f"Pass inputs of width {k}, or build the layer with in_features={x.shape[-1] if x.dim() else '...'}."
        )
    if lora_a.dim() != 2 or lora_a.shape[1] != k:
        raise ValueError(
            f"lora_a has shape {list(lora_a.shape)}; with weight {[n, k]} it must be [R, {k}]. "
            f"Build the layer with in_features={k}."
        )
    r = lora_a.shape[0]
    if tuple(lora_b.shape) != (n, r):
        raise ValueError(
            f"lora_b has shape {list(lora_b.shape)}; with weight {[n, k]} and lora_a {[r, k]} it must be {[n, r]}."
        )
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"bias has shape {list(bias.shape)}; with weight {[n, k]} it must be {[n]} or None.")
    _check_gate_shape(gate, r, x)


def _check_gate_shape(gate: Tensor, r: int, x: Tensor) -> None:
    rows, batch = x.shape[:-1].numel(), x.shape[0] if x.dim() > 1 else 1
    if gate.dim() == 1 and gate.shape[0] == r:
        return
    if gate.dim() == 2 and gate.shape[1] == r and gate.shape[0] in (batch, rows):
        return
    raise ValueError(
        f"gate has shape {list(gate.shape)}; with lora_a [{r}, K] and x {list(x.shape)} it must be [{r}], "
        f"[{batch}, {r}] (one row a sample) or [{rows}, {r}] (one row a token)."
    )


def _check_dtypes(tensors: dict[str, Any]) -> None:
    dtype = tensors["x"].dtype
    if not dtype.is_floating_point:
        raise TypeError(f"x has dtype {dtype}; it must be floating point. Convert it with x.to(weight.dtype).")
    for name in ("weight", "bias"):
        if name in tensors and tensors[name].dtype != dtype:
            raise TypeError(
                f"{name} has dtype {tensors[name].dtype} and x has {dtype}; they must share a dtype. "
                f"Convert x with x.to({name}.dtype), or run under torch.autocast."
            )
    for name in ("lora_a", "lora_b"):
        if tensors[name].dtype not in (dtype, torch.float32):
            raise TypeError(f"{name} has dtype {tensors[name].dtype}; it must be {dtype} as x, or torch.float32.")
    if not tensors["gate"].dtype.is_floating_point:
        raise TypeError(f"gate has dtype {tensors['gate'].dtype}; it must be torch.float32.")
