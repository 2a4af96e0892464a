"""Sequential full fine-tuning: what most tables of continual learning start from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastlora.continual.configs.full import FullConfig
from fastlora.continual.methods.base import Method, TaskContext
from fastlora.continual.methods.weights import freeze, interpolate_, put_back, snapshot, trainable


class FullFineTuning(Method):
    """Every weight of the tower(s) by AdamW, one task after the other; the temperature of the logits stays frozen.

    The baseline "Continual FT" of ZSCL (arXiv 2303.06628), by its published script: lr 1e-5, betas (0.9, 0.999), no
    weight decay, both towers. Simplified: the trainer's loss and cosine, without label smoothing (0.2) and warm-up.
    After a task, theta <- theta_previous + merge_scale (theta - theta_previous).
    """

    config_class = FullConfig
    trains = True
    adapters_alone = False
    journaled = False

    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__(config, **options)
        self.before: dict[str, Tensor] = {}  # during a task: the weights that it started from
        self.trained: dict[str, nn.Parameter] = {}

    def begin_task(self, ctx: TaskContext) -> None:
        config = self.config
        freeze(ctx.model)
        self.before = snapshot(ctx.model)
        self.trained = trainable(ctx.model, config.where, config.parameters)
        for parameter in self.trained.values():
            parameter.requires_grad_(True)
        ctx.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=config.lr, betas=(0.9, 0.999), weight_decay=config.weight_decay
        )

    def end_task(self, ctx: TaskContext) -> None:
        if self.config.merge_scale != 1.0:
            interpolate_(self.trained, self.before, self.config.merge_scale)
        self._forget_task(ctx.model)

    def abandon(self, model: nn.Module) -> None:
        if self.before:
            put_back(model, self.before)
            self._forget_task(model)

    def _forget_task(self, model: nn.Module) -> None:
        freeze(model)
        self.before, self.trained = {}, {}
