"""Uniform shrink: what a threshold does to the size of an update, without its choice of components."""

from __future__ import annotations

from typing import ClassVar

from fastlora.continual.configs.base import AdapterConfig
from fastlora.continual.configs.rules import UniformShrinkConfig
from fastlora.continual.methods.base import TaskContext
from fastlora.continual.methods.components import shrink_threshold, shrink_uniformly_
from fastlora.continual.methods.lora import LoRA


class ShrinkingLoRA(LoRA):
    """Sequential LoRA with a threshold in units of the components' contributions, from 0.3 of a task on."""

    def threshold(self, ctx: TaskContext) -> float:
        """kappa_t of the step in work."""
        lr = ctx.optimizer.param_groups[0]["lr"]
        return shrink_threshold(self.config.shrink, lr, ctx.step["iteration"], self.config.iterations)


class UniformShrink(ShrinkingLoRA):
    """B <- B max(0, 1 - kappa_t / mean_i c_i) in each module after every step; every component is kept.

    The module's mean stands where the group soft threshold (method contribution_prox) has each component's own c_i: a
    module loses about as much, and nothing is selected. No paper: a control.
    """

    config_class: ClassVar[type[AdapterConfig]] = UniformShrinkConfig

    def after_step(self, ctx: TaskContext) -> None:
        kappa = self.threshold(ctx)
        if kappa > 0:
            shrink_uniformly_(ctx.model, kappa)
