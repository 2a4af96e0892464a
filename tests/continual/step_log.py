"""Every step of a training as the methods' tests look at it: the adapters before, between and after what acts on them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

import fastlora
from fastlora.continual import Trainer

State = dict[str, dict[str, torch.Tensor]]  # module -> lora_a, lora_b, gate


def state_of(model) -> State:
    return {
        name: {key: getattr(adapter, key).detach().clone() for key in ("lora_a", "lora_b", "gate")}
        for name, adapter in fastlora.adapters(model)
    }


@dataclass
class Step:
    """before: the optimizer's step; stepped: after it, its proximal step included; after: the method's after_step."""

    task: int
    iteration: int
    lr: float
    before: State
    grads: dict[str, dict[str, torch.Tensor | None]]
    stepped: State
    after: State = field(default_factory=dict)


def train(model, tokenizer, stream, config, *, method=None, seed=0) -> tuple[Trainer, list[Step], list[State]]:
    """(trainer, its steps, the adapters of each task before they are merged)."""
    trainer, steps, ends = Trainer(model, tokenizer, stream, config, seed=seed, progress=False), [], []
    if method is not None:
        trainer.method = method
    hooks = {name: getattr(trainer.method, name) for name in ("begin_task", "after_step", "end_task")}

    def begin_task(ctx):
        hooks["begin_task"](ctx)
        step = ctx.optimizer.step

        def logged():
            before, lr = state_of(ctx.model), ctx.optimizer.param_groups[0]["lr"]
            grads = {
                name: {key: None if (g := getattr(adapter, key).grad) is None else g.clone() for key in before[name]}
                for name, adapter in fastlora.adapters(ctx.model)
            }
            step()
            steps.append(Step(ctx.number, ctx.step["iteration"], lr, before, grads, state_of(ctx.model)))

        ctx.optimizer.step = logged

    def after_step(ctx):
        hooks["after_step"](ctx)
        steps[-1].after = state_of(ctx.model)

    def end_task(ctx):
        ends.append(state_of(ctx.model))
        return hooks["end_task"](ctx)

    trainer.method.begin_task, trainer.method.after_step, trainer.method.end_task = begin_task, after_step, end_task
    trainer.fit()
    return trainer, steps, ends
