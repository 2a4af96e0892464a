"""PEFT's LoRA layer: adapters in float32 (its default) or in the dtype of the base ("no cast").

PEFT has no gate: it is folded into lora_B, so that every rival computes one function. Where PEFT is not installed its
computation is written out here, and the case says so.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rivals.case import Adapter, Case, Operands


@functools.cache
def installed() -> tuple[Any, str]:
    """PEFT, or None and the reason; imported on first use, since it takes seconds."""
    try:
        return importlib.import_module("peft"), ""
    except ImportError as error:
        return None, f"peft cannot be imported ({error})"


def build(operands: Operands, cast: bool) -> Case:
    """cast: adapters in float32, as PEFT makes them unless told otherwise."""
    dtype = torch.float32 if cast else operands.dtype
    layers = [layer(*_part(operands, part), dtype) for part in range(operands.shape.parts)]
    leaves = [p for each in layers for p in each.parameters() if p.requires_grad]
    name = "peft" if cast else "peft no-cast"
    return Case(name, operands, lambda x: tuple(each(x) for each in layers), leaves, note=note())


def note() -> str:
    peft, absent = installed()
    return f"peft {peft.__version__}" if peft else f"{absent}: its computation, written out"


def layer(weight: Tensor, bias: Tensor, adapter: Adapter, dtype: torch.dtype = torch.float32) -> nn.Module:
    """PEFT's layer over this frozen one; the adapter is copied."""
    lora_a, lora_b, gate = adapter
    make = _Written if installed()[0] is None else _installed
    return make(weight, bias, lora_a, lora_b * gate, dtype)


def _part(operands: Operands, part: int) -> tuple[Tensor, Tensor, Adapter]:
    rows = operands.rows(part)
    return operands.weight[rows], operands.bias[rows], operands.adapters[part]


def _installed(weight: Tensor, bias: Tensor, lora_a: Tensor, lora_b: Tensor, dtype: torch.dtype) -> nn.Module:
    (peft, _), r = installed(), lora_a.shape[0]
    linear = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    config = peft.LoraConfig(r=r, lora_alpha=r, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(linear), config, autocast_adapter_dtype=dtype == torch.float32)
    found = model.base_model.model[0]
    found.base_layer.weight.data, found.base_layer.bias.data = weight, bias  # one weight for all rivals
    for half, value in ((found.lora_A["default"], lora_a), (found.lora_B["default"], lora_b)):
        half.weight.data = value.to(device=weight.device, dtype=dtype, copy=True)
    return found


class _Written(nn.Module):
    """result = base(x); result + lora_B(lora_A(x cast to the adapter's dtype)) * scaling, cast back."""

    def __init__(self, weight: Tensor, bias: Tensor, lora_a: Tensor, lora_b: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.base_weight, self.base_bias = weight, bias
        self.lora_a, self.lora_b = (nn.Parameter(t.to(dtype, copy=True)) for t in (lora_a, lora_b))
        self.scaling = 1.0

    def forward(self, x: Tensor) -> Tensor:
        result = F.linear(x, self.base_weight, self.base_bias)
        update = F.linear(F.linear(x.to(self.lora_a.dtype), self.lora_a), self.lora_b) * self.scaling
        return (result + update).to(result.dtype)
