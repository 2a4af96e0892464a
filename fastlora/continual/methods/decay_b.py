"""Decay of B: the plainest control that trades learning for forgetting."""

from __future__ import annotations

import torch

import fastlora
from fastlora.continual.annealing import cosine
from fastlora.continual.configs.rules import DecayBConfig
from fastlora.continual.methods.base import TaskContext
from fastlora.continual.methods.lora import LoRA


class DecayB(LoRA):
    """B <- B (1 - d f(t)) after every step, with f(t) = lr_t / lr; every component is kept.

    Decoupled weight decay (arXiv 1711.05101, Algorithm 2) on B alone, with d in place of lr times the decay's weight.
    """

    config_class = DecayBConfig

    @torch.no_grad()
    def after_step(self, ctx: TaskContext) -> None:
        factor = 1.0 - self.config.decay * cosine(1.0, ctx.step["iteration"], self.config.iterations)
        torch._foreach_mul_([adapter.lora_b for _, adapter in fastlora.adapters(ctx.model)], factor)
