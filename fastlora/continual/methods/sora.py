"""SoRA: sparse low-rank adaptation (arXiv 2311.11696)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastlora
from fastlora.continual.configs.gated import SoRAConfig
from fastlora.continual.methods.base import TaskContext
from fastlora.continual.methods.gated import GatedMethod
from fastlora.optim import KappaSchedule


@dataclass(frozen=True)
class ConstantKappa(KappaSchedule):
    """kappa_max at every iteration from the first on."""

    def kappa(self, iteration: int) -> float:
        return self.kappa_max


class SoRA(GatedMethod):
    """delta W = (alpha / r) sum_i g_i B[:, i] A[i, :];  g <- T_xi(g - AdamW step) after every step.

    A Kaiming-uniform, B 0, g ~ N(0, 1), as in the published code, whose optimizer has the operator that is called
    `released` here. Simplified: optimizer, learning-rate schedule, loss and targets are those of CoDyRA, so there is no
    warm-up, weight decay or clipping, and a task is one fine-tuning; the paper's rising threshold (Algorithm 1), which
    trains anew for each value, is left out.
    """

    config_class = SoRAConfig

    def __init__(self, config: SoRAConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self.scaling = config.alpha / config.rank

    def thresholds(self) -> KappaSchedule:
        return ConstantKappa(self.config.kappa, total=self.config.iterations)

    def extra_loss(self, ctx: TaskContext) -> Tensor | None:
        if self.config.penalty == 0:
            return None
        gates: list[Tensor] = [adapter.gate for _, adapter in fastlora.adapters(ctx.model)]
        return self.config.penalty * torch.cat(gates).abs().sum() / (len(gates) * self.config.rank)
