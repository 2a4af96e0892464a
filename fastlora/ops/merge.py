"""Public merge_() and unmerge_(): the update of every module added to its weight in place, all modules in one call."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypedDict, TypeVar

import torch
from torch import Tensor

from fastlora.ops.merge_checks import MergeJob, check_merge, check_rounding
from fastlora.ops.merge_native import NativeMerge, serves
from fastlora.ops.merge_report import Counts, MergeError, MergeReport, ModuleMerge, module_merge, raise_bad
from fastlora.ops.merge_torch import TorchMerge

# one merge at a time: two threads that add to one weight would each overwrite what the other has just written
_turn = threading.RLock()

_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")

__all__ = ["MergeError", "MergeReport", "ModuleMerge", "merge_", "new_residuals", "unmerge_"]


class MergeOptions(TypedDict, total=False):
    """Options of `merge_` that hold for every module of a call."""

    rounding: str
    seed: int | None
    check: bool


def merge_(
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    gates: Sequence[Tensor],
    *,
    scaling: float | Sequence[float] = 1.0,
    rounding: str = "nearest",
    residuals: Sequence[Tensor] | None = None,
    seed: int | None = None,
    check: bool = True,
    names: Sequence[str] | None = None,
) -> MergeReport:
    """Add the update of each module to its weight, in place.

        weight += scaling * lora_b @ diag(gate) @ lora_a                                        (CoDyRA, end of a task)

    Args:
        weights: [N, K] each; float32, float16, bfloat16 or float64, mixed as they come. Contiguous, rows or columns of
            a larger matrix (the q, k, v of a packed projection), or transposed.
        lora_as: [R, K] each; any of these dtypes, any strides, on the weight's device. R = 0 is legal.
        lora_bs: [N, R] each.
        gates: [R] each, effective (already thresholded). Ranks whose gate is 0 are not visited.
        scaling: one float, or one for each module.
        rounding: "nearest" (to even), or "stochastic": up with the probability of the dropped part. Stochastic has no
            bias and twice the variance: over many merges its error is larger (docs/merge.md has the figures).
        residuals: [N, K] each, see `new_residuals`: what rounding drops is kept there and added at the next merge, so
            that the weight is always the exact sum, rounded once, and `unmerge_` gets back to where it was.
        seed: of stochastic rounding, 0 to 2^63 - 1; None draws one from torch's generator. It is in the report.
        check: look at everything first, and write only if every adapter and every result is finite.
        names: of the modules, for messages and the report.
    Returns:
        MergeReport, one entry for each module. Called while a CUDA graph is being captured (check=False), it reads its
        figures from the device when they are first looked at.
    Raises:
        MergeError: check=True, and an adapter holds a non-finite value (dead ranks included), or a result would not be
            finite in the weight's dtype. No weight of the call has changed.
        TypeError, ValueError: the arguments do not fit each other, are not plain memory that can be written, or two
            weights share memory. No weight of the call has changed.
        MemoryError: no room for the tables of the merge. No weight of the call has changed.
    Numerics:
        The update is summed in float32 from 0 by fused multiply-adds over the kept ranks in rank order, each
        (lora_b * float32(scaling * gate)) * lora_a; then it is added to float32(weight), and to the residual if there
        is one, and rounded once to the weight's dtype. An update of exactly 0 leaves the bits of its weight. Same bits
        for any number of threads and any instruction set, report included; on CUDA the same weights. What stochastic
        rounding draws depends on seed, place of the module in the call, and place in the weight's storage (Philox4x32).
        float64 weights, other devices and installations without the extension run the same formula in PyTorch, float64
        for float64, products unfused.
    Threads:
        Calls from several threads run one after the other, so that none overwrites another's update.
    """
    seed = check_rounding(rounding, residuals, seed)
    if rounding == "stochastic" and seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    return run_jobs(check_merge(weights, lora_as, lora_bs, gates, scaling, names, residuals), seed, check)


def unmerge_(
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    gates: Sequence[Tensor],
    *,
    scaling: float | Sequence[float] = 1.0,
    residuals: Sequence[Tensor] | None = None,
    check: bool = True,
    names: Sequence[str] | None = None,
) -> MergeReport:
    """Take the update of each module out of its weight again, in place: `merge_` with -scaling.

    With the residuals that the merge filled, the weights come back bit for bit wherever the merge did not move an
    element far above its own size. Without them what the merge rounded away is gone: `error_norm` of the two reports
    bounds ||weight - original||_F by their sum. For an exact undo whatever the sizes, rebuild from a journal
    (`fastlora.Journal`).

    Args, Returns, Raises: as `merge_`, with rounding to nearest.
    """
    check_rounding("nearest", residuals, None)
    jobs = check_merge(weights, lora_as, lora_bs, gates, scaling, names, residuals)
    return run_jobs([job.negated() for job in jobs], None, check)


def new_residuals(weights: Sequence[Tensor], *, int8: bool = False) -> list[Tensor]:
    """Residuals of zero for weights that are exact as they are.

    Args:
        weights: [N, K] each, floating.
        int8: units of ulp(weight) / 254, one byte an element, for float32, float16 and bfloat16 weights; else the
            weight's own dtype: finer, and as large as the weights.
    Returns:
        [N, K] each, int8 or the dtype of its weight, on its device.
    """
    return [torch.zeros_like(weight, dtype=torch.int8 if int8 else None, requires_grad=False) for weight in weights]


def run_jobs(
    jobs: Sequence[MergeJob],
    seed: int | None,
    check: bool,
    told: Sequence[MergeJob] | None = None,
    of_all: Callable[[Sequence[Counts]], Sequence[Counts]] = lambda counts: counts,
) -> MergeReport:
    """Check jobs and carry them out.

    Args:
        told: what report and errors speak of in place of the jobs: the whole weights, of which jobs have shards.
        of_all: makes the figures of the whole from those of the shards.
    """
    groups: dict[str, list[int]] = {}
    for i, job in enumerate(jobs):
        groups.setdefault(f"native {job.weight.device}" if serves(job.weight) else "torch", []).append(i)
    runners = [
        (members, (TorchMerge if where == "torch" else NativeMerge)([jobs[i] for i in members], seed))
        for where, members in groups.items()
    ]
    with _turn:  # the check too: it tells of the weights as they are then
        if check:
            raise_bad(told or jobs, of_all(_in_order(jobs, [(members, runner.check()) for members, runner in runners])))
        pending = [(members, runner.merge()) for members, runner in runners]

    def read() -> tuple[ModuleMerge, ...]:
        counts = of_all(_in_order(jobs, [(members, read_group()) for members, read_group in pending]))
        return tuple(module_merge(job, each) for job, each in zip(told or jobs, counts))

    backend = "+".join(sorted({runner.kind for _, runner in runners})) or "none"
    report = MergeReport(read, backend, seed)
    if not any(runner.capturing for _, runner in runners):
        len(report)
    return report


def _in_order(jobs: Sequence[MergeJob], done: Sequence[tuple[list[int], Sequence[Counts]]]) -> list[Counts]:
    """The counts of all groups in the order of the call."""
    by_index = {i: counts for members, group in done for i, counts in zip(members, group)}
    return [by_index[i] for i in range(len(jobs))]


def one_at_a_time(work: Callable[_Given, _Made]) -> Callable[_Given, _Made]:
    """Decorator of what reads adapters, merges and resets them: a second thread finds the adapters as the first left them."""

    @functools.wraps(work)
    def waiting(*args: _Given.args, **kwargs: _Given.kwargs) -> _Made:
        with _turn:
            return work(*args, **kwargs)

    return waiting


def _new_turn() -> None:
    """In a child of a fork, where the thread that had the turn does not exist."""
    global _turn
    _turn = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_turn)
