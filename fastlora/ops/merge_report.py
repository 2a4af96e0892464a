"""What a merge tells: the report of what it did, and the error that names why it did nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from fastlora.ops.merge_checks import MergeJob

_TOLD = 8  # modules that an error lists by name


class MergeError(RuntimeError):
    """A merge that would store something else than finite numbers; no weight of the call has changed.

    Attributes:
        modules: names of the modules at fault.
    """

    def __init__(self, message: str, modules: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.modules = tuple(modules)


@dataclass(frozen=True)
class ModuleMerge:
    """What a merge did to one module.

    Attributes:
        name: of the module, or its number in the call.
        shape: (N, K) of the weight.
        dtype: of the weight.
        kept_rank: ranks with gate != 0; the others were never visited.
        delta_norm: ||scaling * lora_b @ diag(gate) @ lora_a||_F, of the update as it was summed.
        unchanged: share of the elements with a non-zero update whose stored value did not change: it was too small for
            the weight's dtype. Without a residual it is lost, with one it waits there.
        max_relative_error: largest |stored - (weight + update)| / |weight + update| over the elements. What a residual
            keeps counts as stored, here and in error_norm.
        error_norm: ||stored - (weight + update)||_F, what rounding took away.
        not_finite: results that are infinite or NaN; with check=True always 0.
    """

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    kept_rank: int
    delta_norm: float
    unchanged: float
    max_relative_error: float
    error_norm: float
    not_finite: int = 0

    @property
    def relative_error(self) -> float:
        """The share of the update that rounding took away, error_norm / delta_norm; 0 without an update."""
        return self.error_norm / self.delta_norm if self.delta_norm else 0.0


class MergeReport:
    """What a merge did, one `ModuleMerge` for each module in the order of the call; str() is a table.

    Attributes:
        modules: the ModuleMerges; of a captured merge they are read from the device here, once, which waits for it.
        backend: what ran: "cpp", "cuda" or "torch", joined by "+" when a call needed several; "none" for no modules.
        seed: of stochastic rounding, else None.
    """

    def __init__(self, read: Callable[[], tuple[ModuleMerge, ...]], backend: str, seed: int | None = None) -> None:
        self._read, self.backend, self.seed = read, backend, seed

    @cached_property
    def modules(self) -> tuple[ModuleMerge, ...]:
        return self._read()

    def __reduce__(self) -> Any:
        return _report_of, (self.modules, self.backend, self.seed)

    def __len__(self) -> int:
        return len(self.modules)

    def __iter__(self) -> Iterator[ModuleMerge]:
        return iter(self.modules)

    def __str__(self) -> str:
        width = max([len("module"), *(len(module.name) for module in self.modules)])
        head = f"{'module':<{width}}  {'dtype':<8}  {'rank':>4}  {'|delta|':>9}  {'unchanged':>9}  {'of it lost':>10}"
        rows = [
            f"{module.name:<{width}}  {_short(module.dtype):<8}  {module.kept_rank:>4}  {module.delta_norm:>9.3g}  "
            f"{module.unchanged:>9.1%}  {module.relative_error:>10.2%}"
            + (f"  {module.not_finite} NOT FINITE" if module.not_finite else "")
            for module in self.modules
        ]
        return "\n".join([head, *rows, f"{len(self.modules)} modules merged by {self.backend}"])


def _report_of(modules: tuple[ModuleMerge, ...], backend: str, seed: int | None) -> MergeReport:
    return MergeReport(lambda: modules, backend, seed)


class Counts(Protocol):
    """One module's figures, as the extension and the PyTorch path give them (csrc/merge.h says what each one is)."""

    kept_rank: int
    delta_square: float
    updated: int
    unchanged: int
    not_finite: int
    largest: float
    max_relative: float
    lost_square: float
    bad_residual: int
    bad_a: int
    bad_b: int
    bad_gate: int


def module_merge(job: MergeJob, counts: Counts) -> ModuleMerge:
    return ModuleMerge(
        name=job.name,
        shape=(job.weight.shape[0], job.weight.shape[1]),
        dtype=job.weight.dtype,
        kept_rank=counts.kept_rank,
        delta_norm=math.sqrt(counts.delta_square),
        unchanged=counts.unchanged / counts.updated if counts.updated else 0.0,
        max_relative_error=counts.max_relative,
        error_norm=math.sqrt(counts.lost_square),
        not_finite=counts.not_finite,
    )


def raise_bad(jobs: Sequence[MergeJob], counts: Sequence[Counts]) -> None:
    """Raise MergeError if a check counted anything."""
    faults = [(job.name, found) for job, each in zip(jobs, counts) if (found := _faults(job, each))]
    if not faults:
        return
    lines = [f"  {name}: {', '.join(found)}" for name, found in faults]
    more = [f"  and {len(lines) - _TOLD} more"] if len(lines) > _TOLD else []
    first = f"{len(faults)} of {len(jobs)} modules cannot be merged; no weight has been changed."
    last = (
        "Restore the adapter from its last good checkpoint or reset it; for an overflow lower `scaling` or keep the "
        "weight in float32. check=False merges regardless."
    )
    raise MergeError("\n".join([first, *lines[:_TOLD], *more, last]), modules=[name for name, _ in faults])


def _faults(job: MergeJob, counts: Counts) -> list[str]:
    inputs = {"lora_a": counts.bad_a, "lora_b": counts.bad_b, "gate": counts.bad_gate, "residual": counts.bad_residual}
    found = [
        f"{what} holds {bad} non-finite of {getattr(job, what).numel()} values" for what, bad in inputs.items() if bad
    ]
    if counts.not_finite:
        limit = torch.finfo(job.weight.dtype).max
        found.append(
            f"{counts.not_finite} of {job.weight.numel()} results are not finite in {_short(job.weight.dtype)} "
            f"(largest {counts.largest:.6g}, limit {limit:.6g})"
        )
    return found


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
