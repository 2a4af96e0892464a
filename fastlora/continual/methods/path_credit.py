"""Path credit: components are kept for what their own steps did to the loss."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

import fastlora
from fastlora.continual.batches import generator_for
from fastlora.continual.configs.rules import PathCreditConfig
from fastlora.continual.methods.base import TaskContext
from fastlora.continual.methods.selecting import SelectingLoRA


class PathCredit(SelectingLoRA):
    """omega_i = -sum_t (<dL/db_i, Delta b_i> + <dL/da_i, Delta a_i>), with the Delta that the optimizer took.

    To first order the fall of the loss that the steps of component i brought about: the path integral of synaptic
    intelligence (arXiv 1703.04200, Eq. 3), summed over a component. At mid-task each module gets its number of
    components (config.budget) and fills it (config.within).
    """

    config_class = PathCreditConfig

    def __init__(self, config: PathCreditConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self._credits: list[Tensor] = []
        self._before: list[Tensor] = []

    @property
    def draws(self) -> str:
        return "choice" if self.config.within == "random" else ""

    def begin_task(self, ctx: TaskContext) -> None:
        super().begin_task(ctx)
        self._credits = [torch.zeros_like(adapter.gate) for _, adapter in fastlora.adapters(ctx.model)]
        self._before = [parameter.detach().clone() for parameter in _directions(ctx)]

    def after_step(self, ctx: TaskContext) -> None:
        if ctx.step["iteration"] < self.selection:
            self._add_credits(ctx)  # first of all: what follows is no step of the optimizer
        super().after_step(ctx)
        if ctx.step["iteration"] + 1 < self.selection:
            torch._foreach_copy_(self._before, [parameter.detach() for parameter in _directions(ctx)])
        else:
            self._before = []

    @torch.no_grad()
    def _add_credits(self, ctx: TaskContext) -> None:
        directions = _directions(ctx)
        products = torch._foreach_sub(directions, self._before)
        grads = cast(list[Tensor], [parameter.grad for parameter in directions])  # just after a backward pass
        torch._foreach_mul_(products, grads)
        for credit, lora_a, lora_b in zip(self._credits, products[::2], products[1::2]):
            credit.sub_(lora_a.sum(1)).sub_(lora_b.sum(0))

    def chosen(self, ctx: TaskContext) -> Tensor:
        sizes = [credit.numel() for credit in self._credits]
        credits = torch.cat(self._credits).cpu()
        kept = _best(credits, self.kept_count(ctx))
        if self.config.budget == "module":
            totals = [float(part.sum()) for part in credits.split(sizes)]
            budgets = proportional(totals, sizes, self.kept_count(ctx))
        else:
            budgets = [int(part.sum()) for part in kept.split(sizes)]
        if self.config.within == "random":
            credits = torch.rand(len(credits), generator=generator_for(ctx.seed, "selection", ctx.number))
        return torch.cat([_best(part, budget) for part, budget in zip(credits.split(sizes), budgets)])


def _directions(ctx: TaskContext) -> list[Tensor]:
    """lora_a and lora_b of each adapter in turn."""
    return [part for _, adapter in fastlora.adapters(ctx.model) for part in (adapter.lora_a, adapter.lora_b)]


def _best(values: Tensor, count: int) -> Tensor:
    """bool like `values`: the `count` largest; of equal ones those that come first."""
    kept = torch.zeros(len(values), dtype=torch.bool)
    kept[values.argsort(descending=True, stable=True)[:count]] = True
    return kept


def proportional(weights: Sequence[float], sizes: Sequence[int], count: int) -> list[int]:
    """Whole numbers that sum to `count`, in proportion to `weights` as far as `sizes`, their upper limits, allow.

    One after the other goes to the largest weight / (2 n + 1), where n is what it has (Sainte-Lague); negative weights
    count as 0, and where all are 0 each gets the same.
    """
    given = [0] * len(weights)
    queue = [(-max(weight, 0.0), 0, i) for i, (weight, size) in enumerate(zip(weights, sizes)) if size]
    heapq.heapify(queue)
    for _ in range(count):
        _, _, i = heapq.heappop(queue)
        given[i] += 1
        if given[i] < sizes[i]:
            heapq.heappush(queue, (-max(weights[i], 0.0) / (2 * given[i] + 1), given[i], i))
    return given
