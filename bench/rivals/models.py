"""CLIP models whose every matrix is adapted as others do it: attention of separate layers, one linear layer by rival."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rivals.case import Adapter
from rivals.eager_released import update
from rivals.unsloth_style import apply

Linear = Callable[[Tensor, Tensor, Adapter], nn.Module]  # (weight, bias, adapter) -> layer


class ReleasedLinear(nn.Module):
    """Frozen weight, float32 adapter, gate [1, R]; the formula as published."""

    def __init__(self, weight: Tensor, bias: Tensor, adapter: Adapter) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        lora_a, lora_b, gate = adapter
        self.lora_A, self.lora_B, self.gate = nn.Parameter(lora_a), nn.Parameter(lora_b), nn.Parameter(gate[None])

    def forward(self, x: Tensor) -> Tensor:
        return update(x, self.weight, self.bias, self.lora_A, self.lora_B, self.gate)


class UnslothLinear(nn.Module):
    """Manual autograd, the gate folded into lora_B."""

    def __init__(self, weight: Tensor, bias: Tensor, adapter: Adapter) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        lora_a, lora_b, gate = adapter
        self.lora_A, self.lora_B = nn.Parameter(lora_a), nn.Parameter(lora_b * gate)

    def forward(self, x: Tensor) -> Tensor:
        (y,) = apply(x.flatten(0, -2), self.weight, self.bias, self.lora_A, self.lora_B)
        return y.unflatten(0, x.shape[:-1])


class Attention(nn.Module):
    """q, k and v as three layers, then torch's own attention, which is generous to a rival."""

    def __init__(self, plain: Any, linear: Linear, adapters: Iterator[Adapter]) -> None:
        super().__init__()
        self.heads, self.returns_weights = plain.num_heads, isinstance(plain, nn.MultiheadAttention)
        parts = zip(plain.in_proj_weight.detach().chunk(3), plain.in_proj_bias.detach().chunk(3))
        self.q, self.k, self.v = (linear(weight, bias, next(adapters)) for weight, bias in parts)
        self.out = linear(plain.out_proj.weight.detach(), plain.out_proj.bias.detach(), next(adapters))

    def forward(self, q_x: Tensor, k_x: Any = None, v_x: Any = None, need_weights: bool = False, attn_mask: Any = None):
        batch, length, width = q_x.shape
        q, k, v = (
            project(q_x).view(batch, length, self.heads, -1).transpose(1, 2) for project in (self.q, self.k, self.v)
        )
        mask = None if attn_mask is None else attn_mask.to(q.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(batch, length, width)
        out = self.out(mixed)
        return (out, None) if self.returns_weights else out


def blocks(model: Any) -> list[Any]:
    """Of both towers, vision first."""
    return [*model.visual.transformer.resblocks, *model.transformer.resblocks]


def adapt(model: Any, linear: Linear, rank: int) -> list[nn.Parameter]:
    """All six matrices of every block become layers of a rival, in place; returns what it trains, gates last in a layer."""
    adapters = iter(draw_adapters(model, rank))
    for block in blocks(model):
        block.attn = Attention(block.attn, linear, adapters)
        for name in ("c_fc", "c_proj"):
            plain = getattr(block.mlp, name)
            setattr(block.mlp, name, linear(plain.weight.detach(), plain.bias.detach(), next(adapters)))
    return [p for block in blocks(model) for p in block.parameters() if p.requires_grad]


def draw_adapters(model: Any, rank: int) -> list[Adapter]:
    """The adapters that every rival starts from: q, k, v, out, c_fc, c_proj of each block, float32, on the model's device."""
    generator, drawn = torch.Generator().manual_seed(0), []

    def normal(*size: int, scale: float) -> Tensor:
        return torch.randn(*size, generator=generator).mul_(scale)

    for block in blocks(model):
        width, device = block.attn.in_proj_weight.shape[1], block.attn.in_proj_weight.device
        for n, k in [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]:
            adapter = normal(rank, k, scale=k**-0.5), normal(n, rank, scale=0.01), normal(rank, scale=1.0)
            drawn.append(tuple(tensor.to(device) for tensor in adapter))
    return drawn
