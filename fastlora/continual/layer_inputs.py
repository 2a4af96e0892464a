"""What the adapted layers of a model see: second moments of their inputs over a task's images and prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastlora
from fastlora.continual.batches import in_order
from fastlora.continual.device import to_device
from fastlora.continual.methods.base import TaskContext
from fastlora.continual.text import encode_text
from fastlora.continual.training_data import prompts
from fastlora.modules.adapter import RankAdapter
from fastlora.modules.attention import PackedProjection


def input_of(name: str, adapter: RankAdapter) -> str:
    """Name of the module whose input the adapter reads; q, k and v share that of their attention."""
    return name.rpartition(".")[0] if isinstance(adapter, PackedProjection) else name


@torch.no_grad()
def input_moments(ctx: TaskContext, batch_size: int) -> dict[str, Tensor]:
    """sum of x x^T over every input row of the task, [K, K] float32, by the names of `input_of`.

    Rows are the tokens of every training image, and of the prompt of every class. Nothing is drawn, and dropout is off.

    Args:
        ctx: its model has adapters; q, k and v are taken to read one input, as in the blocks of open_clip's towers.
    """
    assert ctx.train is not None
    model: Any = ctx.model
    moments: dict[str, Tensor] = {}
    hosts = dict.fromkeys(input_of(name, adapter) for name, adapter in fastlora.adapters(ctx.model))
    handles = [ctx.model.get_submodule(host).register_forward_pre_hook(_adding(moments, host)) for host in hosts]
    training = ctx.model.training
    ctx.model.eval()
    try:
        for images, _ in in_order(ctx.train, batch_size):
            model.encode_image(to_device(images, ctx.device))
        encode_text(ctx.model, prompts(ctx.task, ctx.model, ctx.tokenizer).to(ctx.device))
    finally:
        ctx.model.train(training)
        for handle in handles:
            handle.remove()
    return moments


def _adding(moments: dict[str, Tensor], host: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].flatten(0, -2).float()
        moments[host] = moments.get(host, 0.0) + rows.t() @ rows

    return hook
