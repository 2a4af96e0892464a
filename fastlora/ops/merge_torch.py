"""Merge in plain PyTorch, with the contract of the extension: for float64 weights, for devices that the extension does
not serve, and for installations without it.

    delta = sum over the kept ranks, in rank order, of (lora_b[:, r] * (scaling * gate[r])) * lora_a[r, :]

In float32 (float64 for float64 weights), added to the weight in that precision, rounded once. Products and sums are not
fused, so results may differ from the extension's in the last bit of that precision. Rows are worked on in chunks.
csrc/merge_rounding.h says what stochastic rounding and residuals compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora.ops.merge_checks import MergeJob
from fastlora.ops.merge_memory import strides
from fastlora.ops.merge_rounding import draws, residual_store, residual_value, round_randomly

_CHUNK = 1 << 20  # elements worked on together


@dataclass
class TorchReport:
    """The fields of the extension's ItemReport, same meaning."""

    kept_rank: int = 0
    delta_square: float = 0.0
    updated: int = 0
    unchanged: int = 0
    not_finite: int = 0
    largest: float = 0.0
    max_relative: float = 0.0
    lost_square: float = 0.0
    bad_residual: int = 0
    bad_a: int = 0
    bad_b: int = 0
    bad_gate: int = 0


class TorchMerge:
    """Jobs of any devices."""

    kind = "torch"
    capturing = False

    def __init__(self, jobs: Sequence[MergeJob], seed: int | None) -> None:
        self._jobs, self._seed = jobs, seed

    def check(self) -> list[TorchReport]:
        return [_check(job, self._seed) for job in self._jobs]

    def merge(self) -> Callable[[], list[TorchReport]]:
        reports = [_merge(job, self._seed) for job in self._jobs]
        return lambda: reports


@torch.no_grad()
def _check(job: MergeJob, seed: int | None) -> TorchReport:
    """Non-finite inputs, and results that would not be finite; reads only."""
    report = TorchReport(kept_rank=len(_kept(job.gate)))
    report.bad_a, report.bad_b, report.bad_gate = (_bad(tensor) for tensor in (job.lora_a, job.lora_b, job.gate))
    report.bad_residual = 0 if job.residual is None else _bad(job.residual)
    if not (report.bad_a or report.bad_b or report.bad_gate or report.bad_residual):
        for rows, delta in _deltas(job):
            total, rounded, _ = _sum(job, rows, delta, seed)
            _count_not_finite(total, rounded, report)
    return report


@torch.no_grad()
def _merge(job: MergeJob, seed: int | None) -> TorchReport:
    report = TorchReport(kept_rank=len(_kept(job.gate)))
    for rows, delta in _deltas(job):
        old = job.weight[rows].to(delta.dtype)
        total, rounded, lost = _sum(job, rows, delta, seed)
        _count_not_finite(total, rounded, report)
        stored = rounded.to(delta.dtype)
        if job.residual is not None:
            kept = torch.where(delta != 0, residual_store(lost, rounded, job.residual.dtype), job.residual[rows])
            lost = torch.where(delta != 0, lost - residual_value(kept, rounded, delta.dtype), 0)
            job.residual[rows] = kept
        relative = (lost / total).abs().nan_to_num(nan=0.0, posinf=float("inf"))
        report.delta_square += _square(delta)
        report.lost_square += _square(lost)
        report.updated += int((delta != 0).sum())
        report.unchanged += int(((delta != 0) & (stored == old)).sum())
        report.max_relative = max(report.max_relative, float(relative.max()))
        job.weight[rows] = rounded
    return report


def _sum(job: MergeJob, rows: slice, delta: Tensor, seed: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """weight + update (+ residual) in the working precision, as it is stored, and what storing it loses."""
    weight = job.weight[rows]
    old = weight.to(delta.dtype)
    had = 0 if job.residual is None else residual_value(job.residual[rows], weight, delta.dtype)
    step = delta + had
    total = torch.where(delta != 0, old + step, old)
    if seed is not None and weight.dtype in (torch.float16, torch.bfloat16):
        by_rows = strides(job.weight)[1] == 1
        rounded = round_randomly(total, weight.dtype, draws(seed, job.place, rows, job.weight.shape[1], by_rows))
    else:
        rounded = total.to(weight.dtype)
    rest = _dropped(old, step, total) + _dropped(delta, had, step)
    return total, rounded, (total - rounded.to(delta.dtype)) + torch.where(delta != 0, rest, 0)


def _dropped(a: Tensor, b: Tensor | int, total: Tensor) -> Tensor:
    """What the rounded sum of a and b dropped, exactly (two-sum, Knuth)."""
    part = total - a
    return (a - (total - part)) + (b - part)


def _square(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values)) ** 2


def _kept(gate: Tensor) -> list[int]:
    return (gate != 0).nonzero().flatten().tolist()


def _bad(tensor: Tensor) -> int:
    return int((~torch.isfinite(tensor)).sum())


def _deltas(job: MergeJob) -> Iterator[tuple[slice, Tensor]]:
    """Row slices of the weight with their update in the working precision."""
    kept, (n, k) = _kept(job.gate), job.weight.shape
    if not kept or not job.weight.numel():
        return
    work = torch.float64 if job.weight.dtype == torch.float64 else torch.float32
    gate = (job.gate.to(work) * job.scaling).tolist()
    step = max(1, _CHUNK // k)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        delta = torch.zeros(rows.stop - start, k, dtype=work, device=job.weight.device)
        for r in kept:
            delta.addcmul_((job.lora_b[rows, r].to(work) * gate[r])[:, None], job.lora_a[r].to(work))
        yield rows, delta


def _count_not_finite(total: Tensor, rounded: Tensor, report: TorchReport) -> None:
    bad = ~torch.isfinite(rounded)
    count = int(bad.sum())
    if count:
        report.not_finite += count
        largest = float(total[bad].abs().nan_to_num(nan=0.0, posinf=float("inf")).max())
        report.largest = max(report.largest, largest)
