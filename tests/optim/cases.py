"""A layer, a model, and steps of an optimizer on them."""

import torch

from fastlora import FusedRankLoRALinear
from fastlora.optim import ProxAdamW


def layer():
    torch.manual_seed(3)
    made = FusedRankLoRALinear(8, 6, rank=5)
    made.lora_b.data.normal_()
    return made


def sizes(model):
    return [tuple(p.shape) for p in (model.lora_a, model.lora_b, model.gate)]


def train(model, optimizer, steps, seed, before_step=None):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 8, generator=generator)).square().sum().backward()
        if before_step:
            before_step()
        optimizer.step()


def assert_same(a, b):
    for p, q in zip(a.parameters(), b.parameters()):
        assert torch.equal(p, q)


def make(model=None, **options):
    model = model or layer()
    optimizer = ProxAdamW(model, lr=1e-2, **options)
    optimizer.kappa = 0.01
    return model, optimizer
