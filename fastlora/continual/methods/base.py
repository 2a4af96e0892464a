"""What a method is to the trainer: four hooks and a threshold; and the adapter life cycle that most methods share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import fastlora
from fastlora.adapt import RankReport
from fastlora.continual.batches import generator_for
from fastlora.continual.config import LoRAConfig, MethodConfig
from fastlora.continual.stream import Task
from fastlora.journal import Journal
from fastlora.optim import ProxAdamW


@dataclass
class TaskContext:
    """What the hooks of one task see. `begin_task` sets the optimizer; the trainer refreshes `step` before each hook.

    Args:
        model: the model in training; the plain merged one before begin_task and after end_task.
        task: the current task, without its training data.
        number: 1 for the first task.
        seed: of the run.
        seen_classes: number of classes of the earlier tasks.
        journal: takes the task's adapters; None when nothing is kept.
        optimizer: steps and anneals; the lr of each of its groups is the one at the first step of the task.
        step: iteration (from 0), images, labels, image_features, text_features and loss of the step in work.
    """

    model: nn.Module
    task: Task
    number: int
    seed: int
    seen_classes: int
    journal: Journal | None = None
    optimizer: Any = None
    step: dict[str, Any] = field(default_factory=dict)


class Method:
    """A method that does not train. `config_class` names its options; subclasses override hooks."""

    config_class: ClassVar[type[MethodConfig]] = MethodConfig
    trains: ClassVar[bool] = False

    def __init__(self, config: Any, *, backend: str = "auto") -> None:
        if not isinstance(config, self.config_class):
            raise TypeError(
                f"config is a {type(config).__name__}; {type(self).__name__} takes a {self.config_class.__name__}. "
                "Build that one, or look the method up by its config's name in METHODS."
            )
        self.config: Any = config
        self.backend = backend

    def begin_task(self, ctx: TaskContext) -> None:
        """Before the first step: make the model trainable and set ctx.optimizer."""

    def kappa(self, iteration: int) -> float:
        """Threshold of the proximal step after the optimizer step of `iteration` (from 0)."""
        return 0.0

    def extra_loss(self, ctx: TaskContext) -> Tensor | None:
        """A 0-d term that is added to the loss of a step, or None."""
        return None

    def after_step(self, ctx: TaskContext) -> None:
        """After the optimizer step (and its proximal step) of every iteration."""

    def end_task(self, ctx: TaskContext) -> RankReport | None:
        """After the last step: leave a plain model with what was learned in its weights; the ranks that it took."""
        return None

    def active_rank(self, model: nn.Module) -> float | None:
        """Mean number of live components per module, for the log; None without adapters. Waits for the device once."""
        return None

    def null_model(self) -> dict[str, float] | None:
        """total_shrink, survival, expected_rank of gates that see no gradient; None for methods that prune nothing."""
        return None

    def abandon(self, model: nn.Module) -> None:
        """A task was cut short: leave the plain model as it was before the task."""


class AdapterMethod(Method):
    """One fresh adapter per task in every target, merged at the end of the task.

    Between tasks the model is the plain one: what is evaluated and saved is what a user gets, without any adapter.
    """

    config_class = LoRAConfig
    trains = True
    prox = "exact"
    gate_init = "normal"

    def begin_task(self, ctx: TaskContext) -> None:
        config = self.config
        fastlora.inject(
            ctx.model,
            config.rank,
            targets=config.targets,
            where=config.where,
            gate_init=self.gate_init,
            backend=self.backend,
        )
        generator = generator_for(ctx.seed, "adapters", ctx.number)
        for _, adapter in fastlora.adapters(ctx.model):
            adapter.reset_adapter_(generator)
        self.choose_trainable(ctx.model)
        ctx.optimizer = ProxAdamW(ctx.model, lr=config.lr, operator=self.prox)

    def choose_trainable(self, model: nn.Module) -> None:
        """Freeze what this method does not train; all of lora_a, lora_b and gate train by default."""

    def end_task(self, ctx: TaskContext) -> RankReport:
        report = fastlora.rank_report(ctx.model)
        fastlora.prune(ctx.model)
        if ctx.journal is not None:
            # the pruned adapters beside the untouched base rebuild the model after any task
            ctx.journal.append(ctx.model, ctx.task.name)
        fastlora.merge(ctx.model)
        fastlora.remove(ctx.model)
        return report

    def active_rank(self, model: nn.Module) -> float:
        gates = [adapter.gate.detach() for _, adapter in fastlora.adapters(model)]
        return int(torch.count_nonzero(torch.cat(gates))) / len(gates)

    def abandon(self, model: nn.Module) -> None:
        fastlora.remove(model)
