"""What the adapted layers of a model ask of the kernels: sizes, ranks and dtype of their calls."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.adapt import adapters
from fastlora.modules.adapter import RankAdapter
from fastlora.modules.attention import _PackedAttention


@dataclass(frozen=True)
class Call:
    """What a layer asks of the kernels.

    Attributes:
        m: M, rows of the input.
        n: N, columns of the output; of packed projections their sum.
        k: K, columns of the input.
        r: R, the rank; of packed projections their sum.
        dtype: of the input.
        ranks: of packed projections q, k and v; None for a single layer.
    """

    m: int
    n: int
    k: int
    r: int
    dtype: torch.dtype
    ranks: tuple[int, int, int] | None = None


def calls_of(model: nn.Module, *example_inputs: Any) -> list[Call]:
    """The distinct calls that the adapted layers of `model` make, in the order of their first.

    The model runs once, in eval mode and without gradients; fake tensors will do, with which nothing is computed. Under
    torch.autocast the calls have the autocast dtype.

    Args:
        model: with adapters.
        example_inputs: what the model is called with.
    Raises:
        ValueError: the model has no adapters, or none of them was reached.
    """
    if not any(True for _ in adapters(model)):
        raise ValueError(f"{type(model).__name__} has no adapters; call fastlora.inject(model, rank=...) first.")
    found: dict[Call, None] = {}

    def adapted(layer: RankAdapter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["x"]
        found[Call(_rows(x), layer.out_features, layer.in_features, layer.gate.numel(), _dtype(x))] = None

    def packed(attention: _PackedAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        signature = inspect.signature(attention.forward)
        given = signature.bind(*args, **kwargs).arguments
        first, *rest = list(signature.parameters)[:3]
        x, others = given[first], [given.get(name) for name in rest]
        if attention._packs() and all(other is None or other is x for other in others):
            q, k, v = (0 if a is None else a.gate.numel() for a in (attention.q, attention.k, attention.v))
            width = attention.embed_dim
            found[Call(_rows(x), 3 * width, width, q + k + v, _dtype(x), (q, k, v))] = None

    modes = {module: module.training for module in model.modules()}
    hooks = [
        module.register_forward_pre_hook(hook, with_kwargs=True)
        for kind, hook in ((RankAdapter, adapted), (_PackedAttention, packed))
        for module in modes
        if isinstance(module, kind)
    ]
    try:
        with torch.no_grad():
            model.eval()(*example_inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    if not found:
        raise ValueError(f"{type(model).__name__} ran without calling any of its adapted layers.")
    return list(found)


def _rows(x: Tensor) -> int:
    return x.shape[:-1].numel()


def _dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
