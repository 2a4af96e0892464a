"""One ahead-of-time compile as a kernel file describes it: what its launcher would pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import triton

from fastlora.triton_kernels.tiles import TileConfig


@dataclass(frozen=True)
class CompileCase:
    """One ahead-of-time compile: what a launcher would pass. `odd` names the arguments that 16 does not divide."""

    kernel: triton.runtime.KernelInterface
    label: str
    compute: str
    rank: int
    pointers: dict[str, str]
    constexprs: Mapping[str, int | bool | str]
    tile: TileConfig
    odd: tuple[str, ...] = ()


# what an R that 16 does not divide makes odd: R itself and the strides of contiguous [N, R] adapters
ODD_RANK = ("R", "stride_un", "stride_dk", "stride_bn")


def rank_cases(size: str, kernel: triton.runtime.KernelInterface) -> tuple[tuple[int, tuple[str, ...]], ...]:
    """(rank block, odd arguments) to compile for a size class of "project" and "grad"."""
    odd = tuple(kernel.arg_names)
    cases = {"narrow": ((16, ()), (64, ()), (64, ODD_RANK)), "wide": ((128, ()), (256, ()))}
    return cases.get(size, ((64, odd), (256, odd)))
