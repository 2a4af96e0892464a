"""LoRA-Squeeze: train at a high rank, keep the best approximation at a lower one (arXiv 2602.10993)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastlora
from fastlora.adapt import RankReport
from fastlora.continual.configs.subspaces import LoRASqueezeConfig
from fastlora.continual.low_rank import smallest_rank, svd_of_product
from fastlora.continual.methods.base import TaskContext
from fastlora.continual.methods.lora import LoRA
from fastlora.modules.adapter import RankAdapter


class LoRASqueeze(LoRA):
    """delta W = B A of rank r_src, replaced by U_k S_k V_k^T, its best approximation of rank k (Eckart and Young).

    Post-Squeeze (the default) does this once, before the merge; In-Squeeze (`squeezes`) several times along the task, and
    training goes on at the lower rank from B = U sqrt(S), A = sqrt(S) V^T. The paper's randomised SVD of delta W is the
    exact one here, by way of two QR factorisations; the ranks of In-Squeeze fall in equal ratios, evenly spaced; and
    `energy` chooses k by the share of ||delta W||_F^2, each layer its own, which the paper leaves to later work. Its
    Cont-Squeeze, a few more steps after the squeeze, is `squeezes=1` with its one squeeze in mid-task.
    """

    config_class = LoRASqueezeConfig

    def __init__(self, config: LoRASqueezeConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self.schedule = self._schedule()

    def _schedule(self) -> dict[int, int]:
        """Iterations after which is squeezed, and the rank that is then left."""
        config, n = self.config, self.config.squeezes
        ratio = min(1.0, config.target_rank / config.rank)
        return {config.iterations * i // (n + 1): round(config.rank * ratio ** (i / n)) for i in range(1, n + 1)}

    def after_step(self, ctx: TaskContext) -> None:
        rank = self.schedule.get(ctx.step["iteration"] + 1)
        if rank is not None:
            self.squeeze(ctx, rank)

    def end_task(self, ctx: TaskContext) -> RankReport:
        self.squeeze(ctx, self.config.target_rank)
        return super().end_task(ctx)

    def squeeze(self, ctx: TaskContext, rank: int) -> None:
        """Every adapter to `rank`, or to the rank that holds the share `energy`. Waits for the device."""
        for _, adapter in fastlora.adapters(ctx.model):
            squeeze_(adapter, rank, self.config.energy, ctx.optimizer)


@torch.no_grad()
def squeeze_(adapter: RankAdapter, rank: int, energy: float, optimizer: torch.optim.Optimizer) -> None:
    """The best approximation of the adapter's update in place of it, and the optimizer's moments in its coordinates.

    The new factors are linear in the old: A' = P A with P = S^-1/2 U^T B, and B' = B Q with Q = A V S^-1/2. So are their
    gradients, dA' = Q^T dA and dB' = dB P^T, and with them the first moments. Second moments follow as if the gradients
    of two components were uncorrelated.

    Args:
        adapter: its gates are 1.
        rank: components to keep, where energy is 0.
        energy: share of the squared norm to keep.
    """
    lora_a, lora_b = adapter.lora_a.double(), adapter.lora_b.double()
    u, s, vh = svd_of_product(lora_b, lora_a)
    kept = smallest_rank(s.square(), energy) if energy else min(rank, len(s))
    root = s[:kept].sqrt()
    inverse = torch.where(root > 0, 1 / root, 0.0)
    p = inverse[:, None] * (u[:, :kept].t() @ lora_b)  # [kept, R]
    q = (lora_a @ vh[:kept].t()) * inverse  # [R, kept]
    _rotate(optimizer.state.get(adapter.lora_a, {}), lambda moment, power: q.pow(power).t() @ moment)
    _rotate(optimizer.state.get(adapter.lora_b, {}), lambda moment, power: moment @ p.pow(power).t())
    adapter.keep_ranks_(torch.arange(kept, device=adapter.gate.device))
    adapter.lora_a.copy_(root[:, None] * vh[:kept])
    adapter.lora_b.copy_(u[:, :kept] * root)


def _rotate(entry: dict[str, Tensor], rotate: Any) -> None:
    for power, name in enumerate(("exp_avg", "exp_avg_sq"), start=1):
        if name in entry:
            entry[name] = rotate(entry[name].double(), power).to(entry[name].dtype).contiguous()
