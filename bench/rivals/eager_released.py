"""The frozen layer alone, and the formula as the released CoDyRA code writes it, eager or compiled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rivals.case import Case, Operands


def build_linear(operands: Operands) -> Case:
    """F.linear: the limit, which computes no update."""
    weight, bias = operands.weight, operands.bias
    return Case("linear", operands, lambda x: (F.linear(x, weight, bias),), [], checked=False)


def update(x: Tensor, weight: Tensor, bias: Tensor, lora_a: Tensor, lora_b: Tensor, gate: Tensor) -> Tensor:
    return F.linear(x, weight, bias) + (x @ lora_a.t()).mul(gate) @ lora_b.t()


def build_released(operands: Operands) -> Case:
    """q, k and v are separate layers there; adapters and gates [1, R] have the dtype of x, nothing is cast."""
    parts = [
        (operands.weight[operands.rows(p)], operands.bias[operands.rows(p)], *_leaves(adapter, operands.dtype))
        for p, adapter in enumerate(operands.adapters)
    ]
    leaves = [t for part in parts for t in part[2:]]
    return Case("as released", operands, lambda x: tuple(update(x, *part) for part in parts), leaves)


def _leaves(adapter: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> list[Tensor]:
    lora_a, lora_b, gate = adapter
    return [t.to(dtype, copy=True).requires_grad_() for t in (lora_a, lora_b, gate[None])]


def build_compiled(operands: Operands, small: bool) -> Case:
    """The same under torch.compile; without its own CUDA graphs, since the benchmark makes them for everyone."""
    # the code object is shared by all shapes, and recompiles at most eight times
    torch._dynamo.reset()
    case = build_released(operands)
    if small:
        options, note = {"backend": "aot_eager"}, "aot_eager: a small run looks at the plumbing, not at the compiler"
    else:
        options, note = {"mode": "max-autotune-no-cudagraphs"}, "max-autotune-no-cudagraphs"
    compiled = torch.compile(case.call, dynamic=False, **options)
    return Case("compiled", operands, compiled, case.leaves, note=note)
