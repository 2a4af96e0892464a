"""Public merge_(): the update of every module added to its weight in place, all modules in one call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastlora.ops.merge_checks import MergeJob, check_merge
from fastlora.ops.merge_native import NativeMerge, serves
from fastlora.ops.merge_report import Counts, MergeError, MergeReport, ModuleMerge, module_merge, raise_bad
from fastlora.ops.merge_torch import TorchMerge

__all__ = ["MergeError", "MergeReport", "ModuleMerge", "merge_"]


def merge_(
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    gates: Sequence[Tensor],
    *,
    scaling: float | Sequence[float] = 1.0,
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
        check: look at everything first, and write only if every adapter and every result is finite.
        names: of the modules, for messages and the report.
    Returns:
        MergeReport, one entry for each module.
    Raises:
        MergeError: check=True, and an adapter holds a non-finite value (dead ranks included), or a result would not be
            finite in the weight's dtype. No weight of the call has changed.
        TypeError, ValueError: the arguments do not fit each other, are not plain memory, or two weights share memory.
            No weight of the call has changed.
    Numerics:
        The update is summed in float32 from 0 by fused multiply-adds over the kept ranks in rank order, each
        (lora_b * float32(scaling * gate)) * lora_a; then it is added to float32(weight) and rounded once to the
        weight's dtype, to nearest even. An update of exactly 0 leaves the bits of its weight. Same bits, report
        included, for any number of threads and any instruction set; on CUDA the same weights. float64 weights, other
        devices and installations without the extension run the same formula in PyTorch, float64 for float64, products
        unfused. What rounding dropped is gone: subtracting the update again need not restore the weight.
    """
    jobs = check_merge(weights, lora_as, lora_bs, gates, scaling, names)
    groups: dict[str, list[int]] = {}
    for i, job in enumerate(jobs):
        groups.setdefault(f"native {job.weight.device}" if serves(job.weight) else "torch", []).append(i)
    runners = [
        (members, (TorchMerge if where == "torch" else NativeMerge)([jobs[i] for i in members]))
        for where, members in groups.items()
    ]
    if check:
        raise_bad(jobs, _in_order(jobs, [(members, runner.check()) for members, runner in runners]))
    counts = _in_order(jobs, [(members, runner.merge()) for members, runner in runners])
    backend = "+".join(sorted({runner.kind for _, runner in runners})) or "none"
    return MergeReport(tuple(module_merge(job, each) for job, each in zip(jobs, counts)), backend)


def _in_order(jobs: Sequence[MergeJob], done: Sequence[tuple[list[int], Sequence[Counts]]]) -> list[Counts]:
    """The counts of all groups in the order of the call."""
    by_index = {i: counts for members, group in done for i, counts in zip(members, group)}
    return [by_index[i] for i in range(len(jobs))]
