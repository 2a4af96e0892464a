"""Optimizer steps with a proximal step on the gates: ProxAdamW, and two compositions of torch's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastlora.optim import ProxAdamW

KAPPA, LR, BETAS = 1e-4, 5e-4, (0.9, 0.9999)


def ours(directions: list[Tensor], gates: list[Tensor], capturable: bool) -> Callable[[], None]:
    step = ProxAdamW([{"params": directions}, {"params": gates, "prox": True}], lr=LR, betas=BETAS)
    step.kappa = KAPPA
    return step.step


def fused_and_foreach(directions: list[Tensor], gates: list[Tensor], capturable: bool) -> Callable[[], None]:
    options = {"lr": LR, "betas": BETAS, "weight_decay": 0.0, "capturable": capturable}
    adamw = torch.optim.AdamW(directions + gates, fused=True, **options)

    @torch.no_grad()
    def step() -> None:
        adamw.step()
        magnitudes = torch._foreach_abs(gates)
        torch._foreach_sub_(magnitudes, KAPPA)
        torch._foreach_clamp_min_(magnitudes, 0.0)
        signs = torch._foreach_sign(gates)
        torch._foreach_mul_(signs, magnitudes)
        torch._foreach_copy_(gates, signs)

    return step


def as_released(directions: list[Tensor], gates: list[Tensor], capturable: bool) -> Callable[[], None]:
    adamw = torch.optim.AdamW(directions + gates, lr=LR, betas=BETAS, weight_decay=0.0, capturable=capturable)

    def step() -> None:
        adamw.step()
        for gate in gates:
            released_prox(gate, KAPPA)

    return step


def released_prox(gate: Tensor, kappa: float) -> None:
    """The published proximal step; every boolean mask waits for the device."""
    gate.data[gate.data > kappa] -= kappa
    gate.data[gate.data < -kappa] += kappa
    gate.data[gate.data.abs() < kappa] = 0.0


UNCAPTURABLE = {"as released": "its boolean masks wait for the device"}
OPTIMIZERS: dict[str, Callable[..., Callable[[], None]]] = {
    "ProxAdamW": ours,
    "fused AdamW + foreach prox": fused_and_foreach,
    "as released": as_released,
}
