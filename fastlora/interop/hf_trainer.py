"""CoDyRA's optimizer and schedule under transformers' Trainer: the proximal step on the gates, kappa by the step.

    fastlora.inject(model, rank=16, where=["*.q_proj", "*.v_proj"])
    Trainer(model, args, train_dataset=data, optimizers=(prox_adamw(model, args), None), callbacks=[KappaCallback()])

The proximal step is part of `ProxAdamW.step`, so it is taken once an optimizer step whatever the accumulation, and not
at all where a float16 scaler skips the step.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastlora.adapt import adapters
from fastlora.checks import check_kappa
from fastlora.optim import KappaSchedule, ProxAdamW


def prox_adamw(model: nn.Module, args: TrainingArguments, *, operator: str = "exact") -> ProxAdamW:
    """ProxAdamW over everything in `model` that trains, with the rate, betas, eps and decay of `args`.

    The paper has adam_beta2=0.9999, weight_decay=0, lr_scheduler_type="cosine" and no clipping (max_grad_norm=0), none
    of which is the Trainer's default.

    Args:
        model: with adapters (`fastlora.inject`). What else requires a gradient, such as a new head, trains with it.
        args: learning_rate, adam_beta1, adam_beta2, adam_epsilon, and weight_decay, which acts on matrices alone: not on
            biases or norms, and never on gates, which the proximal step shrinks.
        operator: as for `ProxAdamW`.
    Raises:
        ValueError: no adapter trains.
    """
    gates = [adapter.gate for _, adapter in adapters(model) if adapter.gate.requires_grad]
    known = {id(gate) for gate in gates}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    if not any(p.requires_grad for _, adapter in adapters(model) for p in adapter.parameters()):
        raise ValueError(
            f"{type(model).__name__} has no trainable adapter; call fastlora.inject(model, rank=...) first."
        )
    groups = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
        {"params": gates, "weight_decay": 0.0, "prox": True},
    ]
    betas = (args.adam_beta1, args.adam_beta2)
    # ProxAdamW has no eps of its own; a group may
    return ProxAdamW(
        [{**group, "eps": args.adam_epsilon} for group in groups], args.learning_rate, betas, operator=operator
    )


class KappaCallback(TrainerCallback):
    """Sets kappa before every optimizer step, by `KappaSchedule` over the steps of the run.

    kappa is a function of the number of the step and of the run's length: a run that is resumed has the right one.

    Args:
        total_shrink: sum of kappa over the run, in gate units: what a gate without gradient loses. With 0.65, the
            published value, half of the gates drawn from N(0, 1) live whatever the length of the run.
        kappa_max: the ramp's last value instead (published: 0.005, for 500 steps).
        steps, dense: as for `KappaSchedule`.
    Attributes:
        schedule: the `KappaSchedule`, from the beginning of the training on.
    Raises:
        ValueError: both total_shrink and kappa_max; or, when the training begins, an optimizer without a proximal step.
    """

    def __init__(
        self,
        total_shrink: float | None = None,
        *,
        kappa_max: float | None = None,
        steps: int = 50,
        dense: float = 0.5,
    ) -> None:
        if total_shrink is not None and kappa_max is not None:
            raise ValueError(
                f"total_shrink={total_shrink} and kappa_max={kappa_max} were given; one follows from the other. Give one."
            )
        self._kappa_max, self._steps, self._dense = kappa_max, steps, dense
        self._total_shrink = 0.65 if total_shrink is None else total_shrink
        check_kappa(self._total_shrink if kappa_max is None else kappa_max)
        self.schedule: KappaSchedule | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _prox_optimizer(kwargs["optimizer"])
        length = {"steps": self._steps, "dense": self._dense, "total": state.max_steps}
        if self._kappa_max is None:
            self.schedule = KappaSchedule.for_shrink(self._total_shrink, **length)
        else:
            self.schedule = KappaSchedule(self._kappa_max, **length)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.schedule is not None, "the Trainer calls on_train_begin first"
        _prox_optimizer(kwargs["optimizer"]).kappa = self.schedule.kappa(state.global_step)


def _prox_optimizer(optimizer: Any) -> ProxAdamW:
    # accelerate wraps the optimizer, and would take a kappa without passing it on
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(optimizer, ProxAdamW):
        raise ValueError(
            f"the Trainer's optimizer is {type(optimizer).__name__}, which takes no proximal step; pass "
            "optimizers=(prox_adamw(model, args), None) to the Trainer."
        )
    return optimizer
