"""transformers' Conv1D (GPT-2 and its kin), a linear layer whose weight lies transposed in memory, with an adapter."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastlora.modules.adapter import AdapterOptions, RankAdapter

if TYPE_CHECKING:
    from typing_extensions import Unpack


class FusedRankLoRAConv1D(RankAdapter):
    """Drop-in for transformers' `Conv1D` with a frozen weight and a gated low-rank adapter.

    The parameter stays what it was: [K, N], in its storage, under its key. `weight` is its transposed view, which the
    kernels read by its strides and a merge writes in place.

    Args:
        plain: the layer; it gives up its parameters.
        rank: R >= 1.
        options: kappa, scaling, dropout, gate_init, backend, recompute, as for FusedRankLoRALinear.
    """

    transposed = True
    bias: nn.Parameter
    _plain: Any  # transformers' class, which is not imported

    def __init__(self, plain: nn.Module, rank: int = 16, **options: Unpack[AdapterOptions]) -> None:
        super().__init__()
        # not through nn.Module.__setattr__, which takes no parameter under the name of a property
        source: Any = plain
        self._parameters["weight"] = source.weight.requires_grad_(False)
        self.bias = source.bias.requires_grad_(False)
        k, n = source.weight.shape
        self._init_adapter(k, n, rank, **options, device=source.weight.device)
        # the emptied original is kept for to_plain(); it holds no tensor, so nothing has to follow .to() or a copy
        source.weight = source.bias = None
        self.__dict__["_plain"] = plain
        self.train(plain.training)

    @property
    def weight(self) -> Tensor:
        """[N, K], a view of the stored [K, N]."""
        return self._stored().t()

    def _stored(self) -> nn.Parameter:
        stored = self._parameters["weight"]
        assert stored is not None
        return stored

    def to_plain(self) -> nn.Module:
        """The original layer over the same parameters; the adapter is left behind."""
        self._plain.weight, self._plain.bias = self._stored(), self.bias
        return self._plain.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., K] -> [..., N], dtype of `x`; under autocast the autocast dtype."""
        return self._adapted(x, self.weight, self.bias)


def conv1d_class() -> type[nn.Module] | None:
    """transformers' Conv1D, or None; transformers is not imported to find out, since whoever has such a layer did."""
    library = sys.modules.get("transformers.pytorch_utils")
    return None if library is None else library.Conv1D


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D."""
    kind = conv1d_class()
    return kind is not None and isinstance(module, kind)
