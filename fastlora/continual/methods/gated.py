"""What the methods with gates share: a group of their own in the optimizer, the proximal step, and its null model."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

import fastlora
from fastlora.continual.annealing import cosine
from fastlora.continual.methods.base import AdapterMethod, TaskContext
from fastlora.continual.methods.components import evenly, freeze_gates
from fastlora.optim import KappaSchedule, ProxAdamW


class GatedMethod(AdapterMethod):
    """delta W = scaling * sum_i w_i B[:, i] A[i, :];  w <- T_kappa(w - AdamW step), with kappa(t) from `schedule`.

    From the iteration on where a gate at 0 stays there, dead components are dropped during the task, too.
    """

    selects = True

    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__(config, **options)
        self.prox, self.gate_init, self.schedule = config.prox, config.gate_init, self.thresholds()
        self.gate_lr = (config.gate_lr or config.lr) if self.trains_gates else 0.0
        first = self.schedule.exact_from(lambda iteration: cosine(self.gate_lr, iteration, config.iterations))
        self.drops = evenly(first, config.iterations) if config.drop_dead else frozenset()

    def thresholds(self) -> KappaSchedule:
        """kappa over a task of config.iterations."""
        raise NotImplementedError

    @property
    def trains_gates(self) -> bool:
        """Whether gates see a gradient."""
        return True

    @property
    def draws(self) -> str:
        return "gates" if self.gate_init == "normal" else ""

    def choose_trainable(self, model: nn.Module) -> None:
        if not self.trains_gates:
            freeze_gates(model)

    def optimizer(self, model: nn.Module) -> ProxAdamW:
        adapters = [adapter for _, adapter in fastlora.adapters(model)]
        directions = [parameter for adapter in adapters for parameter in (adapter.lora_a, adapter.lora_b)]
        # also gates that do not train: without a gradient they are thresholded all the same
        gates = {"params": [adapter.gate for adapter in adapters], "prox": True, "lr": self.gate_lr}
        return ProxAdamW([{"params": directions}, gates], lr=self.config.lr, operator=self.prox)

    def kappa(self, iteration: int) -> float:
        return self.schedule.kappa(iteration)

    def after_step(self, ctx: TaskContext) -> None:
        if ctx.step["iteration"] + 1 in self.drops:
            self.drop_dead(ctx)

    def null_model(self) -> dict[str, float] | None:
        """What is kept when no gate ever sees a gradient, so that data cannot be credited with it.

        A gate survives when it starts above the sum of all thresholds; with the released operator, whose dead zone is
        twice the threshold, above that sum plus the last threshold.
        """
        shrink, last = self.schedule.total_shrink, self.schedule.kappa(self.config.iterations - 1)
        reach = shrink + (last if self.prox == "released" else 0.0)
        survival = math.erfc(reach / math.sqrt(2)) if self.gate_init == "normal" else float(reach < 1.0)
        return {"total_shrink": shrink, "survival": survival, "expected_rank": survival * self.config.rank}
