"""Which weights of a plain model train, copies of them to go back to, and interpolation with copies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from open_clip.transformer import CustomResidualAttentionBlock, ResidualAttentionBlock
from torch import Tensor, nn

_BLOCKS = (ResidualAttentionBlock, CustomResidualAttentionBlock)


def trainable(model: Any, where: str, which: str) -> dict[str, nn.Parameter]:
    """Parameters of the tower(s) by name; the temperature and the bias of the logits never are among them.

    Args:
        model: an open_clip model.
        where: vision, text or all.
        which: all, or matrices: the two-dimensional weights of the residual blocks, which are what adapters update.
    Raises:
        ValueError: there is none.
    """
    vision = {id(parameter) for parameter in model.visual.parameters()}
    matrices = {
        id(parameter)
        for block in model.modules()
        if isinstance(block, _BLOCKS)
        for parameter in block.parameters()
        if parameter.ndim == 2
    }
    logits = {
        id(parameter) for name in ("logit_scale", "logit_bias") if (parameter := getattr(model, name, None)) is not None
    }
    chosen = {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) not in logits
        and (where == "all" or (where == "vision") == (id(parameter) in vision))
        and (which == "all" or id(parameter) in matrices)
    }
    if not chosen:
        raise ValueError(
            f"{type(model).__name__} has no {which} weights to train in where={where!r}; its blocks are not open_clip's. "
            "Pass parameters=all."
        )
    return chosen


def freeze(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and saved buffers, where the model is."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def put_back(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy `weights` into the model in place, bit for bit; what they do not name stays."""
    for name, value in model.state_dict().items():
        if name in weights:
            value.copy_(weights[name])


@contextlib.contextmanager
def other_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """The model with other weights; its own are back afterwards, bit for bit."""
    own = snapshot(model)
    try:
        put_back(model, weights)
        yield model
    finally:
        put_back(model, own)


@torch.no_grad()
def interpolate_(parameters: Mapping[str, Tensor], anchor: Mapping[str, Tensor], share: float) -> None:
    """theta <- anchor + share (theta - anchor) for every parameter, in place; share 1 changes no bit."""
    for name, parameter in parameters.items():
        parameter.copy_(torch.lerp(anchor[name].to(parameter), parameter.detach(), share))
