"""Argument checks of `merge_`. A merge writes through raw addresses, so what passes here is plain memory, or it raises.

Each message says what was given, what is accepted, and what to do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastlora.ops.merge_memory import check_disjoint, check_writable, residual_strides, strides

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ROUNDINGS = ("nearest", "stochastic")
_ACCEPTED = "float32, float16, bfloat16 or float64"


@dataclass(frozen=True)
class MergeJob:
    """One module of a merge: weight [N, K] += scaling * lora_b [N, R] @ diag(gate [R]) @ lora_a [R, K].

    residual: [N, K] or None. place: in the call, from 0.
    """

    name: str
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    gate: Tensor
    scaling: float
    residual: Tensor | None
    place: int

    def negated(self) -> MergeJob:
        return replace(self, scaling=-self.scaling)


def check_rounding(rounding: str, residuals: Sequence[Tensor] | None, seed: int | None) -> int | None:
    """The seed of stochastic rounding, None for rounding to nearest."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding {rounding!r} is unknown; accepted: {', '.join(map(repr, ROUNDINGS))}.")
    if rounding == "nearest":
        if seed is not None:
            raise ValueError(f'seed {seed} was given with rounding="nearest", which draws nothing; leave one of them.')
        return None
    if residuals is not None:
        raise ValueError(
            'residuals keep what rounding drops, so there is nothing to draw for; pass rounding="nearest" with them.'
        )
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63):
        raise ValueError(f"seed is {seed!r}; it must be an integer from 0 to 2^63 - 1, or None.")
    return seed


def check_merge(
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    gates: Sequence[Tensor],
    scaling: float | Sequence[float],
    names: Sequence[str] | None,
    residuals: Sequence[Tensor] | None = None,
) -> list[MergeJob]:
    """The arguments of `merge_` as one job for each module.

    Raises:
        TypeError: an argument is no list, a tensor is not plain memory, or a dtype is not accepted.
        ValueError: lengths, shapes, devices or strides do not fit, two weights share memory, or one cannot be written.
    """
    lists = {"weights": weights, "lora_as": lora_as, "lora_bs": lora_bs, "gates": gates}
    lists |= {} if residuals is None else {"residuals": residuals}
    for what, given in lists.items():
        if not isinstance(given, (list, tuple)):
            raise TypeError(
                f"{what} is a {type(given).__name__}; it must be a list, one entry for each module. "
                "Pass [tensor] for a single module."
            )
    lengths = {what: len(given) for what, given in lists.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{what} {length}" for what, length in lengths.items())
        raise ValueError(f"the lists have different lengths ({told}); each must have one entry for each module.")
    scalings = _check_scalings(scaling, len(weights))
    kept = [None] * len(weights) if residuals is None else residuals
    rows = zip(_check_names(names, len(weights)), weights, lora_as, lora_bs, gates, scalings, kept)
    jobs = [
        MergeJob(name, weight, lora_a, lora_b, gate, own, residual, place)
        for place, (name, weight, lora_a, lora_b, gate, own, residual) in enumerate(rows)
    ]
    for job in jobs:
        _check_job(job)
    written = [(job.name, job.weight) for job in jobs]
    written += [(f"the residual of {job.name}", job.residual) for job in jobs if job.residual is not None]
    check_disjoint(written)
    check_writable(written)
    return jobs


def _check_names(names: Sequence[str] | None, count: int) -> list[str]:
    if names is None:
        return [f"weights[{i}]" for i in range(count)]
    if len(names) != count:
        raise ValueError(f"names has {len(names)} entries and weights {count}; pass one name for each module, or None.")
    return list(names)


def _check_scalings(scaling: float | Sequence[float], count: int) -> list[float]:
    scalings: list[Any] = list(scaling) if isinstance(scaling, (list, tuple)) else [scaling] * count
    if len(scalings) != count:
        raise ValueError(f"scaling has {len(scalings)} entries and weights {count}; pass one float, or one a module.")
    for value in scalings:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(
                f"scaling is a {type(value).__name__}; it must be a float, or a list of one float a module."
            )
        if not math.isfinite(value):
            raise ValueError(f"scaling is {value}; it must be finite.")
    return scalings


def _check_job(job: MergeJob) -> None:
    tensors = {"weight": job.weight, "lora_a": job.lora_a, "lora_b": job.lora_b, "gate": job.gate}
    for what, tensor in tensors.items():
        _check_plain(tensor, f"{what} of {job.name}")
    _check_shapes(job)
    for what, tensor in tensors.items():
        if tensor.device != job.weight.device:
            raise ValueError(
                f"{what} of {job.name} is on {tensor.device} and its weight on {job.weight.device}; they must share a "
                "device. Move the module as a whole with .to(device)."
            )
    _check_strides(job)
    if job.residual is not None:
        _check_residual(job, job.residual)


def _check_plain(tensor: Any, what: str, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    """Subclasses (DTensor, FakeTensor) and meta tensors answer data_ptr() with something else than their data."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        hint = " Pass the local tensor, or dequantise it." if isinstance(tensor, Tensor) else ""
        raise TypeError(f"{what} is a {type(tensor).__name__}; it must be a plain torch.Tensor or nn.Parameter.{hint}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{what} has dtype {tensor.dtype}; it must be {_ACCEPTED}. Convert it with .to(torch.float32).")
    if tensor.is_meta:
        raise TypeError(f"{what} is on the meta device and has no data; materialise it with .to_empty() and load it.")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_neg():
        raise TypeError(f"{what} is not plain strided memory ({tensor.layout}); pass tensor.to_dense() or a clone.")
    if tensor.numel() and tensor.data_ptr() == 0:
        raise TypeError(f"{what} has no memory behind it (its address is 0); pass a tensor that holds its data.")


def _check_shapes(job: MergeJob) -> None:
    weight, lora_a, lora_b, gate = map(list, (job.weight.shape, job.lora_a.shape, job.lora_b.shape, job.gate.shape))
    if len(weight) != 2:
        raise ValueError(f"weight of {job.name} has shape {weight}; it must be [N, K].")
    n, k = weight
    if len(lora_a) != 2 or lora_a[1] != k:
        raise ValueError(f"lora_a of {job.name} has shape {lora_a}; with weight {weight} it must be [R, {k}].")
    r = lora_a[0]
    if lora_b != [n, r]:
        raise ValueError(
            f"lora_b of {job.name} has shape {lora_b}; with weight {weight} and lora_a {lora_a} it must be {[n, r]}."
        )
    if gate != [r]:
        raise ValueError(
            f"gate of {job.name} has shape {gate}; with lora_a {lora_a} it must be {[r]}. "
            "A gate with one row a sample or token cannot be merged."
        )


def _check_strides(job: MergeJob) -> None:
    row, col = strides(job.weight)
    n, k = job.weight.shape
    if not job.weight.numel() or (col == 1 and row >= k) or (row == 1 and col >= n):
        return
    raise ValueError(
        f"weight of {job.name} has shape {[n, k]} and strides {[row, col]}; one stride must be 1 and the other span a "
        "whole row (a contiguous tensor, rows or columns of one, or its transpose), so that each element has its own "
        "memory. Merge into weight.contiguous() and copy it back."
    )


def _check_residual(job: MergeJob, residual: Tensor) -> None:
    what, weight = f"residual of {job.name}", job.weight
    exact = weight.dtype == torch.float64
    if isinstance(residual, Tensor) and residual.dtype != weight.dtype and (exact or residual.dtype != torch.int8):
        accepted = f"{weight.dtype}, as its weight" + ("" if exact else ", or torch.int8")
        raise TypeError(f"{what} has dtype {residual.dtype}; it must be {accepted}. Make it with new_residuals().")
    _check_plain(residual, what, (*DTYPES, torch.int8))
    if residual.shape != weight.shape or residual.device != weight.device:
        raise ValueError(
            f"{what} is {list(residual.shape)} on {residual.device}; it must be {list(weight.shape)} on {weight.device}, "
            "as its weight. Make it with new_residuals()."
        )
    by_rows = strides(weight)[1] == 1
    row, col = residual_strides(residual, by_rows)
    n, k = residual.shape
    if residual.numel() and not ((col == 1 and row >= k) if by_rows else (row == 1 and col >= n)):
        raise ValueError(
            f"{what} has strides {list(residual.stride())} and its weight {list(weight.stride())}; they must run the same "
            "way. Make it with new_residuals()."
        )
