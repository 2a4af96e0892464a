"""What the methods share that drop components once, in the middle of a task."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import fastlora
from fastlora.continual.methods.base import TaskContext
from fastlora.continual.methods.components import keep_
from fastlora.continual.methods.uniform_shrink import UniformShrink


class SelectingLoRA(UniformShrink):
    """Sequential LoRA: after `at` of the task, `chosen` of the components stay and the others leave; then it trains on.

    The choice waits for the device, once a task. With config.shrink there is a uniform shrink beside it.
    """

    selects = True

    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__(config, **options)
        self.selection = max(1, int(config.at * config.iterations))  # iterations before the choice

    def chosen(self, ctx: TaskContext) -> Tensor:
        """bool [components of all adapters, in their order]: which ones stay."""
        raise NotImplementedError

    def kept_count(self, ctx: TaskContext) -> int:
        """How many components stay, of all of them."""
        return round(self.config.keep * sum(adapter.gate.numel() for _, adapter in fastlora.adapters(ctx.model)))

    def after_step(self, ctx: TaskContext) -> None:
        super().after_step(ctx)
        if ctx.step["iteration"] + 1 == self.selection:
            keep_(ctx.model, self.chosen(ctx))
            self.drop_dead(ctx)
