"""CoDyRA: rank minimisation per task by a proximal step on the gates (arXiv 2412.01004)."""

from __future__ import annotations

from typing import Any

import fastlora
from fastlora.continual.configs.gated import CoDyRAConfig
from fastlora.continual.methods.base import TaskContext
from fastlora.continual.methods.gated import GatedMethod
from fastlora.ops.prox import soft_threshold_
from fastlora.optim import KappaSchedule


class CoDyRA(GatedMethod):
    """delta W = sum_i w_i B[:, i] A[i, :];  w <- T_kappa(w - AdamW step), with kappa(t) from KappaSchedule.

    Per task: A Kaiming-uniform, B 0, w ~ N(0, 1); the first half dense, then kappa rises to kappa_max; at the end the
    components with w = 0 are dropped, the rest merged, and the next task starts from a fresh adapter. The controls
    (config.gates) draw the same gates, and do not train them.
    """

    config_class = CoDyRAConfig

    def __init__(self, config: CoDyRAConfig, **options: Any) -> None:
        super().__init__(config, **options)
        if config.gates == "preshrunk":
            self.drops = frozenset()  # begin_task drops them all

    def thresholds(self) -> KappaSchedule:
        config = self.config
        kappa_max = 0.0 if config.gates == "random" else config.kappa_max
        return KappaSchedule(kappa_max, config.kappa_steps, config.dense, config.iterations)

    @property
    def trains_gates(self) -> bool:
        return self.config.gates == "trained"

    def begin_task(self, ctx: TaskContext) -> None:
        super().begin_task(ctx)
        if self.config.gates == "preshrunk" and self.config.drop_dead:
            self.drop_dead(ctx)

    def draw(self, ctx: TaskContext) -> None:
        super().draw(ctx)
        if self.config.gates == "preshrunk":
            gates = [adapter.gate for _, adapter in fastlora.adapters(ctx.model)]
            for iteration in range(self.config.iterations):  # step by step: to the bit what the schedule leaves
                soft_threshold_(gates, self.schedule.kappa(iteration), operator=self.prox)

    def kappa(self, iteration: int) -> float:
        return 0.0 if self.config.gates == "preshrunk" else super().kappa(iteration)

    def null_model(self) -> dict[str, float] | None:
        return None if self.config.gates == "random" else super().null_model()
