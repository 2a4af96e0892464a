"""Arithmetic on the rank-1 components w_i b_i a_i of adapters. Nothing here waits for the device.

A component with gate 0 is dead: it contributes nothing, and the rules here count it as absent, so that it makes no
difference when dead components leave the model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import fastlora
from fastlora.modules.adapter import RankAdapter

# times per task that dead ranks are dropped: each waits for the device and changes the shapes that kernels see
DROPS = 5
# the shrinking rules: kappa_t = 5 lambda lr_t, from this share of the task on
SHRINK_RATE, SHRINK_FROM = 5.0, 0.3
_TINY = torch.finfo(torch.float32).tiny  # in a denominator: 0 / 0 is 0, and anything else / 0 is beyond every limit


def evenly(first: int, total: int) -> frozenset[int]:
    """`first` and a few more iterations between it and `total`: when to drop dead ranks."""
    return frozenset(range(first, total, max(1, math.ceil((total - first) / DROPS))))


def freeze_gates(model: nn.Module) -> None:
    """No gate gets a gradient."""
    for _, adapter in fastlora.adapters(model):
        adapter.gate.requires_grad_(False)


def shrink_threshold(strength: float, lr: float, iteration: int, iterations: int) -> float:
    """kappa_t = 5 strength lr_t from 0.3 of the task on, 0 before; in units of `contributions`.

    Args:
        strength: lambda, the weight of the penalty. lr: learning rate at `iteration`, which counts from 0.
    """
    return SHRINK_RATE * strength * lr if iteration >= SHRINK_FROM * iterations else 0.0


def contributions(adapter: RankAdapter) -> Tensor:
    """c_i = |w_i| ||b_i|| ||a_i||, the Frobenius norm of each component, [R]."""
    return adapter.gate.abs() * adapter.lora_b.norm(dim=0) * adapter.lora_a.norm(dim=1)


@torch.no_grad()
def shrink_uniformly_(model: nn.Module, kappa: float) -> None:
    """B <- B max(0, 1 - kappa / mean_i c_i) in each module, over its live components."""
    for _, adapter in fastlora.adapters(model):
        mean = contributions(adapter).sum() / adapter.gate.count_nonzero().clamp(min=1)
        adapter.lora_b.mul_((1 - kappa / mean.clamp(min=_TINY)).clamp(min=0))


@torch.no_grad()
def threshold_contributions_(model: nn.Module, kappa: float) -> None:
    """b_i <- b_i max(0, 1 - kappa / c_i), and gate 0 where that is 0, so that the component stays dead."""
    for _, adapter in fastlora.adapters(model):
        factors = (1 - kappa / contributions(adapter).clamp(min=_TINY)).clamp(min=0)
        adapter.lora_b.mul_(factors)
        adapter.gate.mul_(factors > 0)


@torch.no_grad()
def keep_(model: nn.Module, kept: Tensor) -> None:
    """Gate 0 for every component that is not in `kept`, bool [components of all adapters, in their order]."""
    adapters = [adapter for _, adapter in fastlora.adapters(model)]
    parts = kept.to(adapters[0].gate.device).split([adapter.gate.numel() for adapter in adapters])
    for adapter, part in zip(adapters, parts):
        adapter.gate.mul_(part)
