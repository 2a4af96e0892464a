"""Merge in plain PyTorch, with the contract of the extension: for float64 weights, for devices that the extension does
not serve, and for installations without it.

    delta = sum over the kept ranks, in rank order, of (lora_b[:, r] * (scaling * gate[r])) * lora_a[r, :]

In float32 (float64 for float64 weights), added to the weight in that precision, rounded once. Products and sums are not
fused, so results may differ from the extension's in the last bit of that precision. Rows are worked on in chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora.ops.merge_checks import MergeJob

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
    bad_a: int = 0
    bad_b: int = 0
    bad_gate: int = 0


class TorchMerge:
    """Jobs of any devices."""

    kind = "torch"

    def __init__(self, jobs: Sequence[MergeJob]) -> None:
        self._jobs = jobs

    def check(self) -> list[TorchReport]:
        return [_check(job) for job in self._jobs]

    def merge(self) -> list[TorchReport]:
        return [_merge(job) for job in self._jobs]


@torch.no_grad()
def _check(job: MergeJob) -> TorchReport:
    """Non-finite inputs, and results that would not be finite; reads only."""
    report = TorchReport(kept_rank=len(_kept(job.gate)))
    report.bad_a, report.bad_b, report.bad_gate = (_bad(tensor) for tensor in (job.lora_a, job.lora_b, job.gate))
    if not (report.bad_a or report.bad_b or report.bad_gate):
        for rows, delta in _deltas(job):
            _count_not_finite(job.weight[rows], delta, report)
    return report


@torch.no_grad()
def _merge(job: MergeJob) -> TorchReport:
    report = TorchReport(kept_rank=len(_kept(job.gate)))
    for rows, delta in _deltas(job):
        weight = job.weight[rows]
        _count_not_finite(weight, delta, report)
        old = weight.to(delta.dtype)
        total = old + delta
        rounded = torch.where(delta != 0, total, old).to(weight.dtype)
        stored = rounded.to(delta.dtype)
        part = total - old
        lost = (total - stored) + ((old - (total - part)) + (delta - part))  # two-sum: what the sum itself dropped
        relative = (lost / total).abs().nan_to_num(nan=0.0, posinf=float("inf"))
        norm = float(torch.linalg.vector_norm(delta))
        report.delta_square += norm * norm
        report.updated += int((delta != 0).sum())
        report.unchanged += int(((delta != 0) & (stored == old)).sum())
        report.max_relative = max(report.max_relative, float(relative.max()))
        weight.copy_(rounded)
    return report


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


def _count_not_finite(weight: Tensor, delta: Tensor, report: TorchReport) -> None:
    total = torch.where(delta != 0, weight.to(delta.dtype) + delta, weight.to(delta.dtype))
    bad = ~torch.isfinite(total.to(weight.dtype))
    count = int(bad.sum())
    if count:
        report.not_finite += count
        largest = float(total[bad].abs().nan_to_num(nan=0.0, posinf=float("inf")).max())
        report.largest = max(report.largest, largest)
