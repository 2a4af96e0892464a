"""O-LoRA: each task learns in a subspace orthogonal to those of the earlier tasks (arXiv 2310.14152)."""

from __future__ import annotations

import torch
from torch import Tensor

import fastlora
from fastlora.adapt import RankReport
from fastlora.continual.configs.subspaces import OLoRAConfig
from fastlora.continual.methods.base import TaskContext
from fastlora.continual.methods.lora import LoRA


class OLoRA(LoRA):
    """loss + penalty * sum over layers and earlier tasks k of sum_ij |A_k A_t^T|_ij, its L_orth; the A_k are frozen.

    Absolute values as in the released code, where the paper squares them. A second penalty of that code, on the norms
    of A_t and B_t, is left out. Adapters are merged after their task, as the paper does for inference, so the earlier
    B_k A_k act through the weights.
    """

    config_class = OLoRAConfig

    def __init__(self, config: OLoRAConfig, **options: str) -> None:
        super().__init__(config, **options)
        self.earlier: dict[str, Tensor] = {}  # by layer: lora_a of every earlier task, [sum R, K]

    def begin_task(self, ctx: TaskContext) -> None:
        super().begin_task(ctx)
        device = ctx.device
        self.earlier = {name: lora_a.to(device) for name, lora_a in self.earlier.items()}

    def extra_loss(self, ctx: TaskContext) -> Tensor | None:
        if not self.earlier or self.config.penalty == 0:
            return None
        overlaps = [
            (self.earlier[name] @ adapter.lora_a.t()).abs().sum() for name, adapter in fastlora.adapters(ctx.model)
        ]
        return self.config.penalty * torch.stack(overlaps).sum()

    def end_task(self, ctx: TaskContext) -> RankReport:
        learned = {name: adapter.lora_a.detach().clone() for name, adapter in fastlora.adapters(ctx.model)}
        report = super().end_task(ctx)
        none = {name: lora_a[:0] for name, lora_a in learned.items()}
        self.earlier = {
            name: torch.cat([(self.earlier or none)[name], lora_a]).contiguous() for name, lora_a in learned.items()
        }
        return report

    def state_dict(self) -> dict[str, Tensor]:
        """lora_a of the earlier tasks, by layer."""
        return {name: lora_a.cpu() for name, lora_a in self.earlier.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.earlier = dict(state)
