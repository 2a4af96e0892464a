"""SD-LoRA: scalable decoupled low-rank adaptation (arXiv 2501.13198)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fastlora
from fastlora.adapt import RankReport
from fastlora.continual.configs.subspaces import SDLoRAConfig
from fastlora.continual.methods.base import AdapterMethod, TaskContext
from fastlora.modules.adapter import RankAdapter
from fastlora.ops.backend import TRITON_MAX_RANK
from fastlora.optim import ProxAdamW


@dataclass
class _Layer:
    """What one layer has learned: base + lora_b diag(gate) lora_a is its weight after the last task.

    lora_a [T r, K], lora_b [N, T r]: T blocks, one a task, each of Frobenius norm 1. gate [T r]: the magnitude of each
    block, r times. base [N, K]: the weight before task 1.
    """

    lora_a: Tensor
    lora_b: Tensor
    gate: Tensor
    base: Tensor

    def to(self, device: torch.device) -> _Layer:
        return _Layer(*(tensor.to(device) for tensor in vars(self).values()))


class SDLoRA(AdapterMethod):
    """W = W0 + sum over tasks k of alpha_k B_k A_k / ||B_k A_k||_F: direction and magnitude apart.

    In task t the directions k < t are frozen, and B_t, A_t and every alpha_k are trained, each layer its own. One adapter
    of rank t r holds all blocks; the r gates of a block are its alpha. Each gate gets the gradient of alpha, the sum over
    its block, so Adam moves all r alike and they stay equal to the last bit. The block in training is not normalised (at
    B_t = 0 it has no direction), as in the released code; after the task its norm goes over into alpha_t. There alphas
    are shared by all layers and start at 0.8 in every task; here they go on from where they were, from 1 when new, so that
    no task begins with a jump. The rank reduction of SD-LoRA-RR and the merging of SD-LoRA-KD are left out.

    Between tasks the model is the plain merged one. `base` brings W0 back bit for bit for the next task, at the price of
    one more copy of the adapted weights. What a task changes is merged (and journaled) as one adapter on top of the
    weights before it: old blocks times what their alphas moved by, and the new block.
    """

    config_class = SDLoRAConfig
    gate_init = "ones"

    def __init__(self, config: SDLoRAConfig, **options: str) -> None:
        super().__init__(config, **options)
        self.layers: dict[str, _Layer] = {}
        self._merged: dict[str, Tensor] = {}  # during a task: the weights before it

    def inject(self, ctx: TaskContext) -> None:
        rank = self.config.rank * ctx.number
        if rank > TRITON_MAX_RANK:
            raise ValueError(
                f"task {ctx.number} brings the rank of a layer to {rank}; sd_lora keeps every task's {self.config.rank} "
                f"components, {TRITON_MAX_RANK} together at most. Lower rank, or give fewer tasks."
            )
        super().inject(ctx)
        self.layers = {name: layer.to(ctx.device) for name, layer in self.layers.items()}
        for name, adapter in fastlora.adapters(ctx.model):
            if self.layers:
                self._go_back(adapter, name)
            tie_gates(adapter, self.config.rank)

    def optimizer(self, model: nn.Module) -> ProxAdamW:
        adapters = [adapter for _, adapter in fastlora.adapters(model)]
        directions = [parameter for adapter in adapters for parameter in (adapter.lora_a, adapter.lora_b)]
        rate = self.config.magnitude_lr or self.config.lr
        magnitudes = {"params": [adapter.gate for adapter in adapters], "prox": True, "lr": rate}  # kappa stays 0
        return ProxAdamW([{"params": directions}, magnitudes], lr=self.config.lr)

    @torch.no_grad()
    def _go_back(self, adapter: RankAdapter, name: str) -> None:
        """W0 into the weight, and the earlier blocks, frozen, before the fresh one."""
        layer = self.layers[name]
        self._merged[name] = adapter.weight.detach().clone()
        adapter.weight.copy_(layer.base)
        old = len(layer.gate)
        grow_(adapter, layer.lora_a, layer.lora_b, layer.gate)
        adapter.lora_a.register_hook(lambda grad: torch.cat([torch.zeros_like(grad[:old]), grad[old:]]))
        adapter.lora_b.register_hook(lambda grad: torch.cat([torch.zeros_like(grad[:, :old]), grad[:, old:]], 1))

    @torch.no_grad()
    def end_task(self, ctx: TaskContext) -> RankReport:
        layers = {name: self._learned(adapter, name) for name, adapter in fastlora.adapters(ctx.model)}
        for name, adapter in fastlora.adapters(ctx.model):
            if self._merged:
                adapter.weight.copy_(self._merged[name])
            adapter.gate.copy_(layers[name].gate - self._magnitudes_before(name, adapter))
        report = super().end_task(ctx)
        self.layers, self._merged = layers, {}
        return report

    def _learned(self, adapter: RankAdapter, name: str) -> _Layer:
        """The layer after this task; its newest block, in the adapter too, scaled to norm 1."""
        r = self.config.rank
        norm = (adapter.lora_b[:, -r:].double() @ adapter.lora_a[-r:].double()).norm().float()
        if bool(norm > 0):
            adapter.lora_b[:, -r:] /= norm
            adapter.gate[-r:] *= norm
        before = self._magnitudes_before(name, adapter)
        gate = before + self.config.merge_scale * (adapter.gate - before)
        base = self.layers[name].base if self.layers else adapter.weight.detach().clone()
        return _Layer(adapter.lora_a.detach().clone(), adapter.lora_b.detach().clone(), gate, base)

    def _magnitudes_before(self, name: str, adapter: RankAdapter) -> Tensor:
        """[T r]: those that the weights before this task hold, 0 for the new block."""
        before = torch.zeros_like(adapter.gate)
        if self.layers:
            before[: -self.config.rank] = self.layers[name].gate
        return before

    def scale(self, model: nn.Module) -> None:
        """Nothing is left to do: merge_scale went into the magnitudes, which the next task starts from."""

    @torch.no_grad()
    def abandon(self, model: nn.Module) -> None:
        for name, adapter in fastlora.adapters(model):
            if name in self._merged:
                adapter.weight.copy_(self._merged[name])
        self._merged = {}
        super().abandon(model)

    def state_dict(self) -> dict[str, Tensor]:
        """By layer: lora_a, lora_b and gate of the earlier tasks, and base, the weight before the first."""
        return {f"{name}.{key}": v.cpu() for name, layer in self.layers.items() for key, v in vars(layer).items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        names = dict.fromkeys(key.rpartition(".")[0] for key in state)
        fields = _Layer.__dataclass_fields__
        self.layers = {name: _Layer(*(state[f"{name}.{key}"] for key in fields)) for name in names}


def tie_gates(adapter: RankAdapter, block: int) -> None:
    """Give each gate the gradient of its block's magnitude, d loss / d alpha_k = sum over the block of d loss / d gate_i."""

    def summed(grad: Tensor) -> Tensor:
        blocks = grad.view(-1, block)
        return blocks.sum(1, keepdim=True).expand_as(blocks).reshape(-1)

    adapter.gate.register_hook(summed)


@torch.no_grad()
def grow_(adapter: RankAdapter, lora_a: Tensor, lora_b: Tensor, gate: Tensor) -> None:
    """Put components before those that the adapter has."""
    adapter.load_state_dict(
        {
            "lora_a": torch.cat([lora_a, adapter.lora_a]),
            "lora_b": torch.cat([lora_b, adapter.lora_b], 1),
            "gate": torch.cat([gate, adapter.gate]),
        },
        strict=False,
    )
