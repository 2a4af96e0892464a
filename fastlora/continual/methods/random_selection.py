"""Random selection: what dropping components does, whichever they are."""

from __future__ import annotations

import torch
from torch import Tensor

import fastlora
from fastlora.continual.batches import generator_for
from fastlora.continual.configs.rules import RandomSelectionConfig
from fastlora.continual.methods.base import TaskContext
from fastlora.continual.methods.selecting import SelectingLoRA


class RandomSelection(SelectingLoRA):
    """Sequential LoRA that keeps a random share of the components, drawn over all modules, from mid-task on. No paper."""

    config_class = RandomSelectionConfig
    draws = "choice"

    def chosen(self, ctx: TaskContext) -> Tensor:
        total = sum(adapter.gate.numel() for _, adapter in fastlora.adapters(ctx.model))
        order = torch.randperm(total, generator=generator_for(ctx.seed, "selection", ctx.number))
        return order < self.kept_count(ctx)
