"""Computing in half precision over weights that stay float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import fastlora

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextlib.contextmanager
def computing_in(dtype: torch.dtype, model: Any) -> Iterator[None]:
    """Within, the frozen weights of `model` are rounded to `dtype`, and so are its activations; no autocast.

    Adapters stay float32: they are the master copies that the optimizer steps. Afterwards, whatever happened, the
    weights are the float32 tensors from before with what was written to *them* alone, so that a merge outside of this
    block loses nothing. Costs a copy of the weights in `dtype`. One-element tensors (the logit scale) keep their dtype.

    Raises:
        ValueError: with gradients enabled, a weight that trains is no adapter's; rounding would lose its steps. Nothing
            was changed.
    """
    if dtype == torch.float32:
        yield
        return
    weights = _frozen(model)
    held = [weight.data for weight in weights]
    for weight, data in zip(weights, held):
        weight.data = data.to(dtype)
    try:
        yield
    finally:
        for weight, data in zip(weights, held):
            weight.data = data


def _frozen(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers to round, each once."""
    adapters = {id(tensor) for _, adapter in fastlora.adapters(model) for tensor in adapter.parameters(recurse=False)}
    found = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        adapted = id(tensor) in adapters and name.rpartition(".")[2] in ("lora_a", "lora_b", "gate")
        # shares of weights were rounded when they were dealt out
        if adapted or isinstance(tensor, DTensor) or not tensor.is_floating_point() or tensor.numel() == 1:
            continue
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} trains, and is no adapter: in half precision its steps would be lost. Train it in float32, or "
                "use a method that trains adapters alone."
            )
        found[id(tensor)] = tensor
    return list(found.values())


def check_dtype(dtype: str, adapters_alone: bool, method: str) -> None:
    """Raises ValueError where a method that trains other weights than adapters is to compute in half precision."""
    if dtype != "float32" and not adapters_alone:
        raise ValueError(
            f"dtype is {dtype!r}, and {method} trains the weights themselves: in half precision their steps would be "
            "lost. Give --dtype float32, or a method that trains adapters."
        )
