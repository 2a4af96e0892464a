"""The same small model with adapters of fastlora and of PEFT, and calls of the ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fastlora
from fastlora import FusedRankLoRALinear

K, N, RANK = 6, 5, 4


def two_linears(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(K, 8), nn.Tanh(), nn.Linear(8, N)).to(dtype)


def ours(model: nn.Module | None = None, *, where: Any = ("0", "2"), size: float = 1.0, **options: Any) -> nn.Module:
    """`model` with adapters that do something."""
    model = two_linears() if model is None else model
    fastlora.inject(model, RANK, where=list(where), **options)
    for _, adapter in fastlora.adapters(model):
        adapter.lora_b.data.normal_(std=size)
    return model


def theirs(model: nn.Module | None = None, *, where: Any = ("0", "2"), size: float = 1.0, **options: Any) -> Any:
    """The same of PEFT."""
    import peft

    model = two_linears() if model is None else model
    options = {"r": RANK, "lora_alpha": RANK, "target_modules": list(where)} | options
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
    for name, parameter in wrapped.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=size)
    return wrapped


def their_layers(wrapped: nn.Module) -> list[Any]:
    """PEFT's layers in their order."""
    from peft.tuners.lora import LoraLayer

    return [module for module in wrapped.modules() if isinstance(module, LoraLayer)]


def trained(k: int = K, n: int = N, rank: int = RANK, **options: Any) -> FusedRankLoRALinear:
    """A layer whose adapter does something."""
    layer = FusedRankLoRALinear(k, n, rank, **options)
    layer.lora_b.data.normal_()
    return layer


def operands(rows: int = 4, **changes: Any) -> list[Any]:
    """x, weight, bias, lora_a, lora_b, gate of a call of rank_lora_linear, some of them replaced."""
    made: dict[str, Any] = {
        "x": torch.randn(rows, K),
        "weight": torch.randn(N, K),
        "bias": torch.randn(N),
        "lora_a": torch.randn(RANK, K),
        "lora_b": torch.randn(N, RANK),
        "gate": torch.randn(RANK),
    }
    return list((made | changes).values())


def module_lists(count: int = 3, dtype: torch.dtype = torch.float32, n: int = 12, k: int = 10) -> list[list[Tensor]]:
    """weights, lora_as, lora_bs and gates of a call of merge_."""
    modules = [
        (torch.randn(n, k).to(dtype), torch.randn(RANK, k), torch.randn(n, RANK), torch.randn(RANK))
        for _ in range(count)
    ]
    return [list(column) for column in zip(*modules)]


class Block(nn.Module):
    """An attention, which reads the weight of its out_proj without calling it, and a linear layer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.attn, self.fc = nn.MultiheadAttention(width, 2, batch_first=True), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.attn(x, x, x, need_weights=False)[0])
