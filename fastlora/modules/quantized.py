"""A gated low-rank adapter over a frozen linear layer whose weight is quantised, by bitsandbytes or torchao.

    y = base(x) + scaling * ((x @ lora_a.T) * soft_threshold(gate, kappa)) @ lora_b.T

The base layer stays whole and computes with its own library's product, forward and backward; the update is added to it
(QLoRA, arXiv 2305.14314, equation 5, with a gate a rank). Nothing here imports either library before a layer of it is met.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastlora.modules.adapter import RankAdapter
from fastlora.ops.merge import one_at_a_time
from fastlora.ops.merge_report import MergeError, MergeReport, ModuleMerge


@dataclass(frozen=True)
class Format:
    """How a layer's weight is stored.

    Args:
        name: in messages.
        dequantize: layer -> [N, K], float32.
        quantize: (layer, [N, K] float32, what the user gave as `requantize`) -> a new weight for the layer.
    """

    name: str
    dequantize: Callable[[Any], Tensor]
    quantize: Callable[[Any, Tensor, Any], nn.Parameter]


def format_of(layer: nn.Module) -> Format | None:
    """The format of a quantised linear layer, None for any other."""
    library, kind = type(layer).__module__.partition(".")[0], type(layer).__name__
    if library == "bitsandbytes" and kind == "Linear8bitLt":
        return Format("bitsandbytes int8", _dense_8bit, _quantized_8bit)
    if library == "bitsandbytes" and kind in ("Linear4bit", "LinearNF4", "LinearFP4"):
        return Format(f"bitsandbytes {_state(layer).quant_type}", _dense_4bit, _quantized_4bit)
    weight = getattr(layer, "weight", None)
    if isinstance(layer, nn.Linear) and type(weight).__module__.partition(".")[0] == "torchao":
        return Format(f"torchao {type(weight).__name__}", _dense_torchao, _quantized_torchao)
    return None


class QuantizedRankLoRALinear(RankAdapter):
    """An adapter over a quantised linear layer.

    Args:
        base: a layer that `format_of` knows; kept as it is, and frozen.
        rank: R >= 1.
        kappa: threshold in gate units, >= 0; settable later.
        scaling: dimensionless factor of the update.
        dropout: probability, on the input of lora_a while training.
        gate_init: "normal" or "ones".
        backend: "auto" or "torch": no kernel of this library reads quantised weights.
        recompute: False; the base layer decides what is kept for backward.
    Raises:
        TypeError: `base` is no quantised linear layer.
        ValueError: another backend, or recompute.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int = 16,
        *,
        kappa: float = 0.0,
        scaling: float = 1.0,
        dropout: float = 0.0,
        gate_init: str = "normal",
        backend: str = "auto",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if format_of(base) is None:
            raise TypeError(
                f"a {type(base).__name__} was given; a linear layer quantised by bitsandbytes or torchao is accepted. "
                "For a plain nn.Linear take FusedRankLoRALinear.from_linear."
            )
        if backend not in ("auto", "torch") or recompute:
            raise ValueError(
                f"backend={backend!r}, recompute={recompute} were given for a quantised layer, whose own library computes "
                "the base product; accepted: backend 'auto' or 'torch', recompute=False."
            )
        self.base = cast(nn.Linear, base.requires_grad_(False))  # as every layer that has a format is
        self._init_adapter(
            self.base.in_features, self.base.out_features, rank, kappa, scaling, dropout, gate_init, backend, recompute,
            self.base.weight.device,
        )  # fmt: skip
        self.train(base.training)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, as it is stored."""
        return self.base.weight

    @property
    def format(self) -> Format:
        found = format_of(self.base)
        assert found is not None, "the base layer was checked when it was given"
        return found

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., K] -> [..., N], in the dtype in which the base layer answers."""
        y = self.base(x)
        return y + self._update(x).to(y.dtype)

    def dequantize(self) -> Tensor:
        """The base weight, [N, K], float32."""
        return self.format.dequantize(self.base)

    @one_at_a_time
    def merge_(  # type: ignore[override]  # a quantised weight takes neither rounding nor residuals
        self, *, requantize: Any = False, generator: torch.Generator | None = None
    ) -> MergeReport:
        """Refused, since a quantised weight holds no small update, unless `requantize` asks for what can be had.

        Args:
            requantize: True, or for torchao the config that the layer was quantised with: dequantise, add the update,
                quantise again. The report tells how much of the update that took away.
            generator: draws the fresh adapter.
        Raises:
            MergeError: not asked for, or the sum is not finite; weight and adapter are unchanged.
        """
        rows = put_requantized({"": self}, requantized({"": self}, requantize), generator)
        return MergeReport(lambda: rows, "requantize")


Made = dict[str, tuple[nn.Parameter, ModuleMerge]]


def requantized(layers: dict[str, QuantizedRankLoRALinear], requantize: Any) -> Made:
    """By name, the weight that holds the update, and what its rounding took away; no layer has changed.

    Raises:
        MergeError: requantize was not asked for, or a sum is not finite.
    """
    if layers and not requantize:
        raise MergeError(_refusal(layers), modules=list(layers))
    return {name: _requantized(name, layer, requantize) for name, layer in layers.items()}


def put_requantized(
    layers: dict[str, QuantizedRankLoRALinear], made: Made, generator: torch.Generator | None = None
) -> tuple[ModuleMerge, ...]:
    """Give each layer its new weight and a fresh adapter."""
    for name, (weight, _) in made.items():
        _put(layers[name].base, weight)
        layers[name].reset_adapter_(generator)
    return tuple(row for _, row in made.values())


def _refusal(layers: dict[str, QuantizedRankLoRALinear]) -> str:
    name, layer = next(iter(layers.items()))
    return (
        f"{name or 'the layer'} stores its weight as {layer.format.name}, whose steps are wider than most updates"
        + (f" ({len(layers)} layers in all)" if len(layers) > 1 else "")
        + ". Keep the adapter beside it, merge into the weights before they were quantised, or pass requantize=True "
        "(for torchao its config) and read in the report what the new rounding took away. No weight has been changed."
    )


@torch.no_grad()
def _requantized(name: str, layer: QuantizedRankLoRALinear, requantize: Any) -> tuple[nn.Parameter, ModuleMerge]:
    old, delta = layer.dequantize(), layer.delta_weight()
    wanted = old + delta
    if not bool(wanted.isfinite().all()):
        raise MergeError(
            f"{name or 'the layer'}: its adapter holds, or its sum with the weight gives, values that are not finite; no "
            "weight has been changed. Restore the adapter from its last good checkpoint or reset it.",
            modules=[name],
        )
    weight = layer.format.quantize(layer.base, wanted, requantize)
    stored = _dense_of(layer, weight)
    touched = delta != 0
    error = stored - wanted
    row = ModuleMerge(
        name=name,
        shape=(layer.out_features, layer.in_features),
        dtype=weight.dtype,
        kept_rank=int((layer.effective_gate() != 0).sum()),
        delta_norm=float(delta.norm()),
        unchanged=float(((stored == old) & touched).sum() / touched.sum().clamp_min(1)),
        max_relative_error=float((error.abs() / wanted.abs().clamp_min(torch.finfo(torch.float32).tiny)).max()),
        error_norm=float(error.norm()),
    )
    return weight, row


def _dense_of(layer: QuantizedRankLoRALinear, weight: nn.Parameter) -> Tensor:
    """What `weight` would be in the layer's place, [N, K], float32."""
    before = _put(layer.base, weight)
    try:
        return layer.dequantize()
    finally:
        _put(layer.base, *before)


def _put(base: Any, weight: nn.Parameter, state: Any = None) -> tuple[nn.Parameter, Any]:
    """Give the layer another weight, and what bitsandbytes keeps of it for its int8 product; returns those that it had."""
    before = base.weight, getattr(base, "state", None)
    base.weight = weight
    if before[1] is not None:
        base.state = state or _fresh_8bit_state(before[1])
    return before


def _fresh_8bit_state(old: Any) -> Any:
    state = type(old)()
    state.threshold, state.has_fp16_weights = old.threshold, old.has_fp16_weights
    return state


def _state(layer: Any) -> Any:
    """What bitsandbytes knows of a 4-bit weight."""
    state = layer.weight.quant_state
    if state is None:
        raise TypeError(
            "the bitsandbytes layer was never quantised, which its .to(device) does. Move the model first, then adapt it."
        )
    return state


def _dense_4bit(layer: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    if getattr(_state(layer), "packing_format_for_cpu", False):
        layer.state_dict()  # after evaluation on a CPU the weight lies repacked; this puts it back
    return dequantize_4bit(layer.weight.data, _state(layer)).float()


def _quantized_4bit(layer: Any, dense: Tensor, requantize: Any) -> nn.Parameter:
    old, state = layer.weight, _state(layer)
    made = type(old)(
        dense.to(state.dtype).cpu(), requires_grad=False, blocksize=state.blocksize, compress_statistics=state.nested,
        quant_type=state.quant_type, quant_storage=old.quant_storage,
    )  # fmt: skip
    return made.to(old.device)


def _dense_8bit(layer: Any) -> Tensor:
    state, weight = layer.state, layer.weight
    rows, scales = (state.CB, state.SCB) if state.CB is not None else (weight.data, weight.SCB)
    if scales is None:
        raise TypeError(
            "the bitsandbytes layer was never quantised, which its .to(device) does. Move the model first, then adapt it."
        )
    return rows.float() * (scales.float() / 127.0)[:, None]


def _quantized_8bit(layer: Any, dense: Tensor, requantize: Any) -> nn.Parameter:
    made = type(layer.weight)(dense.half().cpu(), requires_grad=False, has_fp16_weights=False)
    return made.to(layer.weight.device)


def _dense_torchao(layer: Any) -> Tensor:
    return layer.weight.dequantize().float()


def _quantized_torchao(layer: Any, dense: Tensor, requantize: Any) -> nn.Parameter:
    if requantize is True:
        raise MergeError(
            "requantize=True was given for a layer of torchao, whose weight does not tell its whole config. Pass that, "
            "such as requantize=torchao.quantization.Int8WeightOnlyConfig(). No weight has been changed."
        )
    from torchao.quantization import quantize_

    plain = nn.Linear(dense.shape[1], dense.shape[0], bias=False, device="meta")
    plain.weight = nn.Parameter(dense.to(layer.weight.dtype), requires_grad=False)
    holder = nn.Sequential(plain)
    quantize_(holder, requantize)
    return nn.Parameter(cast(nn.Linear, holder[0]).weight, requires_grad=False)
