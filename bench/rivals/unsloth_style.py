"""Manual autograd in the style of Unsloth: library products, the update added in place, x A^T computed again backward.

Written for this benchmark from the description of the method. It has no gate: that is folded into lora_b.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rivals.case import Case, Operands


class _Layer(torch.autograd.Function):
    """x, weight, bias, then lora_a, lora_b of each part -> one output a part; one gradient of x for all."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, *adapters: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight, *adapters)
        count = len(adapters) // 2
        outputs = []
        for w, b, lora_a, lora_b in zip(weight.chunk(count), bias.chunk(count), adapters[::2], adapters[1::2]):
            outputs.append(F.linear(x, w, b).addmm_(x @ lora_a.t(), lora_b.t()))
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *dys: Tensor):
        x, weight, *adapters = ctx.saved_tensors
        dx, gradients = None, []
        for dy, w, lora_a, lora_b in zip(dys, weight.chunk(len(dys)), adapters[::2], adapters[1::2]):
            p = dy @ lora_b
            gradients += [p.t() @ x, dy.t() @ (x @ lora_a.t())]
            dx = dy @ w if dx is None else dx.addmm_(dy, w)
            dx.addmm_(p, lora_a)
        return dx, None, None, *gradients


def apply(x: Tensor, weight: Tensor, bias: Tensor, *adapters: Tensor) -> tuple[Tensor, ...]:
    """x [M, K]; adapters: lora_a, lora_b of each part."""
    return _Layer.apply(x, weight, bias, *adapters)


def build(operands: Operands) -> Case:
    leaves = []
    for lora_a, lora_b, gate in operands.adapters:
        leaves += [lora_a.clone().requires_grad_(), (lora_b * gate).to(operands.dtype).requires_grad_()]
    weight, bias = operands.weight, operands.bias
    return Case("unsloth style", operands, lambda x: apply(x, weight, bias, *leaves), leaves)
