"""FusedRankLoRALinear, a drop-in for nn.Linear."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from fastlora.modules.adapter import AdapterOptions, RankAdapter

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LinearOptions(AdapterOptions, total=False):
    """What `from_linear` takes by keyword."""

    bias: bool
    device: torch.device | str | None


class FusedRankLoRALinear(RankAdapter, nn.Linear):
    """nn.Linear with a frozen weight and a gated low-rank adapter.

        y = x @ weight.T + bias + scaling * ((x @ lora_a.T) * soft_threshold(gate, kappa)) @ lora_b.T

    state_dict keys: weight, bias, lora_a, lora_b, gate.

    Args:
        in_features: K, columns of the weight.
        out_features: N, rows of the weight.
        rank: R >= 1.
        bias: whether the frozen layer has one.
        kappa: threshold in gate units, >= 0; settable later.
        scaling: dimensionless factor of the update.
        dropout: probability, on the input of lora_a while training; takes an unfused path.
        gate_init: "normal" (N(0, 1), as CoDyRA) or "ones".
        backend: "auto", "torch", "triton", or a variant by name (docs/kernels.md).
        recompute: keep the input alone for backward, and compute the projected rows again there.
        device: of weight, bias and adapter.
        dtype: of weight and bias; the adapter is float32.
    Raises:
        ValueError: rank below 1, kappa negative or not finite, dropout outside [0, 1).
        TypeError: rank is no int.
    """

    weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 16,
        *,
        bias: bool = True,
        kappa: float = 0.0,
        scaling: float = 1.0,
        dropout: float = 0.0,
        gate_init: str = "normal",
        backend: str = "auto",
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self._plain_class: type[nn.Linear] = nn.Linear
        self._freeze()
        self._init_adapter(
            in_features, out_features, rank, kappa, scaling, dropout, gate_init, backend, recompute, device
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int = 16, **options: Unpack[LinearOptions]) -> FusedRankLoRALinear:
        """Wrap `linear`: take over its weight and bias (the same storage) and freeze them.

        Args:
            linear: an nn.Linear, or a subclass that computes as nn.Linear does.
            rank: R >= 1.
            options: as for the constructor.
        Raises:
            TypeError: not an nn.Linear, or one with a forward of its own, or already adapted.
            ValueError: an option is out of range, or `bias` contradicts the layer.
        """
        _check_linear(linear)
        device = options.pop("device", None) or linear.weight.device
        bias = options.pop("bias", linear.bias is not None)
        if bias != (linear.bias is not None):
            raise ValueError(
                f"bias={bias} was given, but the linear layer has {'a' if linear.bias is not None else 'no'} bias."
            )
        # built on meta: the frozen tensors come from `linear`
        others = cast(AdapterOptions, options)
        layer = cls(linear.in_features, linear.out_features, rank, bias=bias, device="meta", **others)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer._plain_class = type(linear)
        layer._freeze()
        layer._materialize(device)
        return layer.train(linear.training)

    def _freeze(self) -> None:
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def _materialize(self, device: torch.device | str) -> None:
        for name in ("lora_a", "lora_b", "gate"):
            setattr(self, name, nn.Parameter(torch.empty_like(getattr(self, name), device=device)))
        self._kappa = torch.full((), self.kappa, device=device)
        self.reset_adapter_()

    def to_linear(self) -> nn.Linear:
        """The plain layer over the same weight and bias; the adapter is left behind."""
        plain = self._plain_class(self.in_features, self.out_features, self.bias is not None, device="meta")
        plain.weight, plain.bias = self.weight, self.bias
        return plain.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output.

        Args:
            x: [..., K], dtype of the weight unless under autocast.
        Returns:
            [..., N], dtype of `x`; under autocast the autocast dtype.
        """
        return self._adapted(x, self.weight, self.bias)


def _check_linear(linear: nn.Module) -> None:
    if isinstance(linear, RankAdapter):
        raise TypeError(
            "the layer already has a rank adapter; call fastlora.remove(model) first, or train the one it has."
        )
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"a {type(linear).__name__} was given; an nn.Linear is accepted.")
    if type(linear).forward is not nn.Linear.forward:
        raise TypeError(
            f"{type(linear).__name__} has a forward of its own, which an adapter would bypass; a plain nn.Linear is accepted."
        )
