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
LARGEST_KAPPA = torch.finfo(torch.float32).max  # gates are float32: beyond, kappa would be infinite beside them


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
    if not 0 <= kappa <= LARGEST_KAPPA:
        raise ValueError(
            f"kappa is {kappa}; it must be finite and >= 0 (a negative kappa grows the gates, an infinite one makes NaN), "
            f"and at most {LARGEST_KAPPA:.4g}, where float32 ends. Use kappa=0.0 to switch the threshold off."
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
    """Each operand is a tensor with one shape for all of it; `bias` may be None."""
    for name, tensor in operands.items():
        if name == "bias" and tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; it must be a torch.Tensor.")
        if tensor.is_nested:
            raise TypeError(
                f"{name} is a nested tensor; a plain one is accepted. Pad it with torch.nested.to_padded_tensor({name}, "
                "0.0), or pass its rows as one tensor."
            )


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
    _check_devices(tensors)


def plainly_fits(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, gate: Tensor) -> bool:
    """Whether the usual call is right: 2 us of every call, where the checks that name what is wrong take 11.

    False says nothing: gates of two dimensions, say, are for `check_rank_lora` to judge.
    """
    try:
        dtype, device = x.dtype, x.device
        (n, k), (r,) = weight.shape, gate.shape
        return (
            not x.is_nested  # first: a nested tensor may have no shape at all
            and x.shape[-1] == k
            and lora_a.shape == (r, k)
            and lora_b.shape == (n, r)
            and weight.dtype == dtype
            and dtype.is_floating_point
            and lora_a.dtype in (dtype, torch.float32)
            and lora_b.dtype in (dtype, torch.float32)
            and gate.dtype == torch.float32
            and weight.device == lora_a.device == lora_b.device == gate.device == device
            and (bias is None or (bias.shape == (n,) and bias.dtype == dtype and bias.device == device))
        )
    except (ValueError, IndexError, AttributeError):  # another number of dimensions, or no tensor
        return False


def check_packed_lists(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_as: Any, lora_bs: Any, gates: Any, kappas: Any
) -> None:
    """Three entries each; an adapter is there as a whole or not at all.

    Raises:
        TypeError: an entry is neither a tensor nor None. ValueError: not three, or half an adapter.
    """
    check_tensors(x=x, weight=weight, bias=bias)
    for name, entries in (("lora_as", lora_as), ("lora_bs", lora_bs), ("gates", gates), ("kappas", kappas)):
        if len(entries) != 3:
            raise ValueError(f"{name} has {len(entries)} entries; it must have three, for q, k and v.")
    for part in range(3):
        adapter = {f"lora_as[{part}]": lora_as[part], f"lora_bs[{part}]": lora_bs[part], f"gates[{part}]": gates[part]}
        missing = [name for name, tensor in adapter.items() if tensor is None]
        if missing and len(missing) < 3:
            raise ValueError(
                f"{', '.join(missing)} is None beside tensors; give the whole adapter, or None three times."
            )
        if not missing:
            check_tensors(**adapter)


def check_packed(x: Tensor, weight: Tensor, bias: Tensor | None, lora_as: Any, lora_bs: Any, gates: Any) -> None:
    """Check shapes, dtypes and devices of a call of `rank_lora_packed`; messages name entry and shape.

    Raises:
        TypeError: a dtype does not fit. ValueError: a shape or a device does not fit.
    """
    if weight.dim() != 2 or weight.shape[0] % 3:
        raise ValueError(f"weight has shape {list(weight.shape)}; it must be [3 d, K], for q, k and v.")
    n, k = weight.shape
    if x.dim() < 1 or x.shape[-1] != k:
        raise ValueError(f"x has shape {list(x.shape)}; with weight {[n, k]} it must be [..., {k}].")
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"bias has shape {list(bias.shape)}; with weight {[n, k]} it must be {[n]} or None.")
    tensors = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    for part in range(3):
        if gates[part] is None:
            continue
        named = {f"lora_as[{part}]": lora_as[part], f"lora_bs[{part}]": lora_bs[part], f"gates[{part}]": gates[part]}
        r = gates[part].shape[0] if gates[part].dim() == 1 else -1
        for (name, tensor), shape in zip(named.items(), ((r, k), (n // 3, r), (r,))):
            if tuple(tensor.shape) != shape:
                wanted = {0: f"[r, {k}]", 1: f"[{n // 3}, r]", 2: "[r]"}[list(named).index(name)]
                raise ValueError(
                    f"{name} has shape {list(tensor.shape)}; with weight {[n, k]} it must be {wanted}, one r a projection."
                )
        tensors |= named
    _check_dtypes(tensors)
    _check_devices(tensors)


def _check_devices(tensors: dict[str, Any]) -> None:
    x = tensors["x"]
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
    for name, tensor in tensors.items():
        if name.startswith("lora_") and tensor.dtype not in (dtype, torch.float32):
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must be {dtype} as x, or torch.float32.")
        if name.startswith("gate") and not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must be torch.float32.")
