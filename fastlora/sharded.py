"""Merging into weights that torch's `fully_shard` (FSDP2) has dealt out: each process adds the rows that it holds.

    weight[rows] += scaling * lora_b[rows] @ diag(gate) @ lora_a

No weight is gathered. The rows of q, k and v in a packed weight fall where the shards of that weight end, which is not
where those of lora_b would: adapters that are sharded are gathered, those that are whole (`ignored_params`) are at hand.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastlora import reference
from fastlora.checks import check_finite_gate
from fastlora.modules.adapter import RankAdapter
from fastlora.ops.merge import MergeReport, new_residuals, run_jobs
from fastlora.ops.merge_checks import MergeJob, check_merge, check_rounding
from fastlora.ops.merge_report import Counts
from fastlora.ops.merge_torch import TorchReport

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    """Whether some parameter of `model` is a DTensor, or will be one when its module is not at work."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # without it there is none
    return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())


@dataclass(frozen=True)
class _Shard:
    """What this process holds of an adapter's weight: `weight` [n, K], its `rows`; the others are held in `group`, or
    all of them here, where that is None."""

    weight: Tensor
    rows: slice
    group: Any


def merge_shards(
    model: nn.Module,
    found: dict[str, RankAdapter],
    residuals: dict[str, Tensor] | None,
    *,
    undo: bool,
    rounding: str = "nearest",
    seed: int | None = None,
    check: bool = True,
) -> MergeReport:
    """`fastlora.merge`, or with `undo` `fastlora.unmerge`, in all processes at once; the report is that of the whole.

    Args:
        residuals: name -> those of the rows that this process holds.
    Raises:
        ValueError: stochastic rounding, or a weight that is dealt out otherwise than by rows.
        MergeError: in every process, whichever of them found it; no weight has changed.
    """
    check_rounding(rounding, None, seed)
    if rounding != "nearest":
        raise ValueError(
            f"rounding is {rounding!r}, and the weights are sharded: what it draws depends on the place in the whole "
            'weight. Pass rounding="nearest", or residuals.'
        )
    for module in model.modules():
        if isinstance(module, sys.modules["torch.distributed.fsdp"].FSDPModule):
            module.reshard()  # a weight that is gathered still is a copy
    gates = {name: _whole(layer.gate.detach()) for name, layer in found.items()}
    for name, gate in gates.items():
        check_finite_gate(gate, f"{name}.gate")
    shards = {name: _shard(name, layer) for name, layer in found.items()}
    lora_bs = [_whole(layer.lora_b.detach()) for layer in found.values()]
    if residuals is not None:
        residuals |= {name: new_residuals([shard.weight])[0] for name, shard in shards.items() if name not in residuals}
    jobs = check_merge(
        [shard.weight for shard in shards.values()],
        [_whole(layer.lora_a.detach()) for layer in found.values()],
        [lora_b[shard.rows] for lora_b, shard in zip(lora_bs, shards.values())],
        [reference.soft_threshold(gate, layer.kappa) for gate, layer in zip(gates.values(), found.values())],
        [layer.scaling for layer in found.values()],
        list(found),
        None if residuals is None else [residuals[name] for name in found],
    )
    jobs = [job.negated() for job in jobs] if undo else jobs
    groups = [shard.group for shard in shards.values()]
    told = [_as_whole(job, lora_b) for job, lora_b in zip(jobs, lora_bs)]
    report = run_jobs(jobs, None, check, told, lambda counts: _of_all(counts, groups))
    _reset(found.values(), groups)
    return report


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if _is_dtensor(tensor) else tensor


def _is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    return isinstance(tensor, sys.modules["torch.distributed.tensor"].DTensor)


def _shard(name: str, layer: RankAdapter) -> _Shard:
    """Rows are dealt out as torch.chunk does it, in the order of the processes of the mesh."""
    parameter, start = layer.weight_rows()
    total = layer.out_features
    if not _is_dtensor(parameter):
        return _Shard(parameter.detach()[start : start + total], slice(0, total), None)
    dims = [dim for dim, placement in enumerate(parameter.placements) if not placement.is_replicate()]
    if len(dims) != 1 or not parameter.placements[dims[0]].is_shard(0):
        raise ValueError(
            f"the weight of {name} is dealt out as {parameter.placements}; a merge takes shards of rows, Shard(0), as "
            "fully_shard makes them. Merge before sharding, or gather the model."
        )
    local: Tensor = parameter.to_local().detach()
    mesh = parameter.device_mesh
    step = -(-len(parameter) // mesh.size(dims[0]))
    first = min(step * mesh.get_local_rank(dims[0]), len(parameter))
    begin, end = max(first, start), max(min(first + len(local), start + total), max(first, start))
    return _Shard(local[begin - first : end - first], slice(begin - start, end - start), mesh.get_group(dims[0]))


def _as_whole(job: MergeJob, lora_b: Tensor) -> MergeJob:
    """The job of the whole weight, for messages and the report."""
    shape = len(lora_b), job.weight.shape[1]
    whole = torch.empty(shape, dtype=job.weight.dtype, device="meta")
    return dataclasses.replace(job, weight=whole, lora_b=lora_b, residual=None if job.residual is None else whole)


_SUMMED = ("delta_square", "updated", "unchanged", "not_finite", "lost_square", "bad_residual", "bad_b")


def _of_all(counts: Sequence[Counts], groups: Sequence[Any]) -> list[Counts]:
    """The figures of the whole weights from those of the shards, the same in every process."""
    fields = [field.name for field in dataclasses.fields(TorchReport)]
    own = [{name: getattr(each, name) for name in fields} for each in counts]
    found: list[Counts] = list(counts)
    for group in dict.fromkeys(group for group in groups if group is not None):
        everyone: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, own, group)
        for index, its in enumerate(groups):
            if its is group:
                shards = [each[index] for each in everyone]
                merged = {name: (sum if name in _SUMMED else max)(part[name] for part in shards) for name in fields}
                found[index] = TorchReport(**merged)
    return found


def _reset(layers: Iterable[RankAdapter], groups: Sequence[Any]) -> None:
    """Fresh adapters, the same in every process."""
    seed = [int(torch.randint(2**63 - 1, ()))]
    for group in dict.fromkeys(group for group in groups if group is not None):
        dist.broadcast_object_list(seed, group=group, group_src=0)
    generator = torch.Generator().manual_seed(seed[0])
    for layer in layers:
        layer.reset_adapter_(generator)
