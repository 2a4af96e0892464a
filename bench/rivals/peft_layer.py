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

from rivals.case import Case, Operands


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
    peft, absent = installed()
    make = _written if peft is None else _installed
    layers = [make(operands, part, dtype) for part in range(operands.shape.parts)]
    leaves = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    name = "peft" if cast else "peft no-cast"
    note = f"peft {peft.__version__}" if peft else f"{absent}: its computation, written out"
    return Case(name, operands, lambda x: tuple(layer(x) for layer in layers), leaves, note=note)


def _folded(operands: Operands, part: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lora_a, lora_b, gate = operands.adapters[part]
    rows = operands.rows(part)
    return operands.weight[rows], operands.bias[rows], lora_a, lora_b * gate


def _installed(operands: Operands, part: int, dtype: torch.dtype) -> nn.Module:
    weight, bias, lora_a, lora_b = _folded(operands, part)
    (peft, _), r = installed(), lora_a.shape[0]
    linear = nn.Linear(weight.shape[1], weight.shape[0], device=operands.device, dtype=operands.dtype)
    config = peft.LoraConfig(r=r, lora_alpha=r, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(linear), config, autocast_adapter_dtype=dtype == torch.float32)
    layer = model.base_model.model[0]
    layer.base_layer.weight.data, layer.base_layer.bias.data = weight, bias  # one weight for all rivals
    for half, value in ((layer.lora_A["default"], lora_a), (layer.lora_B["default"], lora_b)):
        half.weight.data = value.to(device=operands.device, dtype=dtype, copy=True)
    return layer


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


def _written(operands: Operands, part: int, dtype: torch.dtype) -> nn.Module:
    return _Written(*_folded(operands, part), dtype)
