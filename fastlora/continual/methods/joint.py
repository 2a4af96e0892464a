"""Joint training: the upper bound that has the data of all tasks at once."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from fastlora.adapt import RankReport
from fastlora.continual.configs.bounds import JointConfig
from fastlora.continual.methods.base import Method, TaskContext
from fastlora.continual.methods.full import FullFineTuning
from fastlora.continual.methods.lora import LoRA
from fastlora.journal import Journal


class Joint(Method):
    """One LoRA (or all weights) trained on every task in turn, a batch of each, with iterations x tasks steps.

    No paper: the upper bound that tables of continual learning call joint training or multi-task learning. Each batch
    has the loss over its own task's classes, as every other method has it. Nothing is trained after the first row.
    """

    config_class = JointConfig
    trains = True
    joint = True

    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__(config, **options)
        inner: type[Method] = LoRA if config.train == "adapters" else FullFineTuning
        shared = {item.name for item in dataclasses.fields(inner.config_class)} & set(vars(config))
        self.inner = inner(inner.config_class(**{name: getattr(config, name) for name in shared}), **options)
        self.journaled, self.adapters_alone = self.inner.journaled, self.inner.adapters_alone

    def begin_task(self, ctx: TaskContext) -> None:
        self.inner.begin_task(ctx)

    def kappa(self, iteration: int) -> float | None:
        return self.inner.kappa(iteration)

    def end_task(self, ctx: TaskContext) -> RankReport | None:
        every = dataclasses.replace(ctx.task, name="all tasks")  # what the journal calls it
        return self.inner.end_task(dataclasses.replace(ctx, task=every))

    def active_rank(self, model: nn.Module) -> float | None:
        return self.inner.active_rank(model)

    def abandon(self, model: nn.Module) -> None:
        self.inner.abandon(model)

    def rebuild(self, model: nn.Module, journal: Journal, task: int) -> str:
        return super().rebuild(model, journal, 1)
