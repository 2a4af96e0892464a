"""Weights and adapters for the benchmarks of the merge, and the loops that it is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora import ops


@dataclass
class MergeSet:
    """Weights and adapters of one merge; gates are all alive."""

    weights: list[Tensor]
    lora_as: list[Tensor]
    lora_bs: list[Tensor]
    gates: list[Tensor]

    @property
    def lists(self) -> tuple[list[Tensor], ...]:
        return self.weights, self.lora_as, self.lora_bs, self.gates


def make_set(shapes: list[tuple[int, int]], rank: int, dtype: torch.dtype, update: float, seed: int = 0) -> MergeSet:
    """Weights N(0, 1 / K); every element of the update has a standard deviation of `update`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator).mul_(scale)

    return MergeSet(
        [normal(n, k, scale=k**-0.5).to(dtype) for n, k in shapes],
        [normal(rank, k) for _, k in shapes],
        [normal(n, rank, scale=update * rank**-0.5) for n, _ in shapes],
        [torch.ones(rank) for _ in shapes],
    )


def torch_loops(given: MergeSet) -> dict[str, object]:
    """What one would write in PyTorch: adapters in the weight's dtype, or the update in float32 and cast."""
    half = [(b.to(w.dtype), a.to(w.dtype)) for w, a, b in zip(given.weights, given.lora_as, given.lora_bs)]

    def addmm() -> None:
        for weight, (lora_b, lora_a) in zip(given.weights, half):
            weight.addmm_(lora_b, lora_a)

    def update_cast() -> None:  # as PEFT merges float32 adapters
        for weight, lora_a, lora_b in zip(given.weights, given.lora_as, given.lora_bs):
            weight += (lora_b @ lora_a).to(weight.dtype)

    def product_added() -> None:
        for weight, (lora_b, lora_a) in zip(given.weights, half):
            weight += lora_b @ lora_a

    return {"addmm_ in the weight's dtype": addmm, "update in float32, cast, added": update_cast,
            "update in the weight's dtype, added": product_added}  # fmt: skip


def ours(given: MergeSet) -> dict[str, object]:
    """merge_ in every way of rounding."""
    same, int8 = ops.new_residuals(given.weights), ops.new_residuals(given.weights, int8=True)
    return {
        "merge_": lambda: ops.merge_(*given.lists),
        "merge_, check=False": lambda: ops.merge_(*given.lists, check=False),
        "merge_, stochastic": lambda: ops.merge_(*given.lists, rounding="stochastic", seed=1),
        "merge_, residuals": lambda: ops.merge_(*given.lists, residuals=same),
        "merge_, int8 residuals": lambda: ops.merge_(*given.lists, residuals=int8),
    }
