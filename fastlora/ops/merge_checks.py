"""Argument checks of `merge_`. A merge writes through raw addresses, so what passes here is plain memory, or it raises.

Each message says what was given, what is accepted, and what to do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_ACCEPTED = "float32, float16, bfloat16 or float64"


@dataclass(frozen=True)
class MergeJob:
    """One module of a merge: weight [N, K] += scaling * lora_b [N, R] @ diag(gate [R]) @ lora_a [R, K]."""

    name: str
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    gate: Tensor
    scaling: float


def check_merge(
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    gates: Sequence[Tensor],
    scaling: float | Sequence[float],
    names: Sequence[str] | None,
) -> list[MergeJob]:
    """The arguments of `merge_` as one job for each module.

    Raises:
        TypeError: an argument is no list, a tensor is not plain memory, or a dtype is not accepted.
        ValueError: lengths, shapes, devices or strides do not fit, or two weights share memory.
    """
    lists = {"weights": weights, "lora_as": lora_as, "lora_bs": lora_bs, "gates": gates}
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
    columns = (_check_names(names, len(weights)), weights, lora_as, lora_bs, gates, scalings)
    jobs = [MergeJob(*row) for row in zip(*columns)]
    for job in jobs:
        _check_job(job)
    _check_disjoint(jobs)
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


def _check_plain(tensor: Any, what: str) -> None:
    """Subclasses (DTensor, FakeTensor) and meta tensors answer data_ptr() with something else than their data."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        hint = " Pass the local tensor, or dequantise it." if isinstance(tensor, Tensor) else ""
        raise TypeError(f"{what} is a {type(tensor).__name__}; it must be a plain torch.Tensor or nn.Parameter.{hint}")
    if tensor.dtype not in DTYPES:
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


def strides(matrix: Tensor) -> tuple[int, int]:
    """Strides; those of dimensions of size 1, which PyTorch leaves to chance, such that one of the two is 1."""
    (n, k), (row, col) = matrix.shape, matrix.stride()
    col = 1 if k == 1 else col
    return ((k if col == 1 else 1) if n == 1 else row), col


def _check_disjoint(jobs: Sequence[MergeJob]) -> None:
    """Raise when two weights of the call share an element: the result would depend on the order of the writes."""
    spans = sorted((*_span(job.weight), i) for i, job in enumerate(jobs) if job.weight.numel())
    for at, (_, end, i) in enumerate(spans):
        for start, _, j in spans[at + 1 :]:
            if start >= end:
                break
            if jobs[i].weight.device == jobs[j].weight.device and _share(jobs[i].weight, jobs[j].weight):
                raise ValueError(
                    f"{jobs[i].name} and {jobs[j].name} share memory; the weights of one call must be apart. "
                    "If they are tied, merge one of them; if one is to receive two updates, merge them in two calls."
                )


def _span(weight: Tensor) -> tuple[int, int]:
    """First address and the one behind the last."""
    (n, k), (row, col) = weight.shape, strides(weight)
    return weight.data_ptr(), weight.data_ptr() + ((n - 1) * row + (k - 1) * col + 1) * weight.element_size()


def _share(one: Tensor, two: Tensor) -> bool:
    """Whether weights with overlapping spans share an element; side by side in one matrix they need not."""
    by_rows = [strides(tensor)[1] == 1 for tensor in (one, two)]
    if by_rows[0] != by_rows[1] or one.dtype != two.dtype:
        return True
    one, two = (one, two) if by_rows[0] else (one.t(), two.t())
    pitch = strides(one)[0]
    offset, rest = divmod(two.data_ptr() - one.data_ptr(), one.element_size())
    if rest or pitch != strides(two)[0]:
        return True
    # `two` starts at this column, counted from the first column of `one`, in rows of `pitch` elements.
    column = offset % pitch
    return column < one.shape[1] or column + two.shape[1] > pitch
