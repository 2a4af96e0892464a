"""The adapter of one frozen matrix: its three parameters, and what is done with them between tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from fastlora import reference
from fastlora.checks import check_finite_gate, check_kappa, check_layer_options
from fastlora.interrupts import uninterrupted
from fastlora.ops.merge import MergeOptions, merge_, one_at_a_time
from fastlora.ops.rank_lora import rank_lora_linear

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastlora.ops.merge import MergeReport


class AdapterOptions(TypedDict, total=False):
    """What every adapter takes by keyword; `fastlora.FusedRankLoRALinear` says what each is."""

    kappa: float
    scaling: float
    dropout: float
    gate_init: str
    backend: str
    recompute: bool


class LayerMergeOptions(MergeOptions, total=False):
    """What `RankAdapter.merge_` passes on."""

    residuals: Sequence[Tensor] | None


class RankAdapter(nn.Module):
    """Gated low-rank adapter of a frozen `weight` [N, K], which a subclass owns or finds.

    Parameters, float32 and trainable: lora_a [R, K], lora_b [N, R], gate [R]. They stay the same objects through
    `prune_`, `merge_` and `reset_adapter_`: only their contents and shapes change.
    """

    if TYPE_CHECKING:  # some subclasses have a property, others a parameter

        @property
        def weight(self) -> Tensor: ...

    # whether the parameter beneath `weight` is stored [K, N], and `weight` its transposed view
    transposed = False

    _kappa: Tensor

    def _init_adapter(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        kappa: float = 0.0,
        scaling: float = 1.0,
        dropout: float = 0.0,
        gate_init: str = "normal",
        backend: str = "auto",
        recompute: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        check_layer_options(rank, kappa, scaling, dropout, gate_init)
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.scaling, self.dropout = rank, float(scaling), float(dropout)
        self.gate_init, self.backend, self.recompute = gate_init, backend, recompute
        # float32 whatever the weight's dtype: half precision cannot hold an optimizer's steps, nor kappa's on a gate
        self.lora_a = nn.Parameter(torch.empty(rank, in_features, device=device))
        self.lora_b = nn.Parameter(torch.empty(out_features, rank, device=device))
        self.gate = nn.Parameter(torch.empty(rank, device=device))
        self.register_buffer("_kappa", torch.zeros((), device=device), persistent=False)
        self.kappa = kappa
        self.reset_adapter_()

    @property
    def kappa(self) -> float:
        """Threshold in gate units."""
        return self._kappa_value

    @kappa.setter
    def kappa(self, value: float) -> None:
        check_kappa(value)
        self._kappa_value = float(value)
        self._thresholded = self._kappa_value > 0
        self._kappa.fill_(self._kappa_value)

    def _apply(self, fn: Any, recurse: bool = True) -> RankAdapter:
        gate, kappa = self.gate.data, self._kappa
        super()._apply(fn, recurse)
        # gates stay float32 through .half() and .to(dtype): float16(0.3) - 1e-4 rounds back to float16(0.3)
        if self.gate.dtype != torch.float32:
            self.gate.data = gate.to(self.gate.device)
            self._kappa = kappa.to(self._kappa.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._adopt_rank(*(state_dict.get(f"{prefix}{key}") for key in ("lora_a", "lora_b", "gate")))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _adopt_rank(self, lora_a: Any, lora_b: Any, gate: Any) -> None:
        """Take the shapes of a checkpoint that was saved at another (pruned) rank; values follow from the loader.

        What does not fit the layer as a whole changes nothing here: the loader refuses it.
        """
        if not all(isinstance(tensor, Tensor) for tensor in (lora_a, lora_b, gate)):
            return
        r = gate.numel()
        shapes = ((r, self.in_features), (self.out_features, r), (r,))
        if r != self.gate.numel() and (tuple(lora_a.shape), tuple(lora_b.shape), tuple(gate.shape)) == shapes:
            self._set(*(own.new_zeros(shape) for own, shape in zip((self.lora_a, self.lora_b, self.gate), shapes)))

    def _set(self, lora_a: Tensor, lora_b: Tensor, gate: Tensor) -> None:
        parameters = (self.lora_a, self.lora_b, self.gate)
        empty = [p.data.new_empty(0, dtype=torch.float64) for p in parameters]
        with uninterrupted():  # three tensors of one rank
            for parameter, nothing, value in zip(parameters, empty, (lora_a, lora_b, gate)):
                parameter.grad = None
                if hasattr(parameter, "device_mesh"):
                    _set_shard(parameter, value)
                    continue
                # by way of another dtype: only that makes autograd forget the shape it noted for a graph still alive
                parameter.data = nothing
                parameter.data = value

    def _adapted(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output; the threshold is a tensor under torch.compile, so that a new kappa recompiles nothing."""
        if self.drops_out():
            # on the input of lora_a alone, so that base and update have different inputs and nothing is fused
            return nn.functional.linear(x, weight, bias) + self._update(x)
        return rank_lora_linear(
            x, weight, bias, self.lora_a, self.lora_b, self.gate, self.call_kappa(), self.scaling,
            backend=self.backend, recompute=self.recompute,
        )  # fmt: skip

    def call_kappa(self) -> float | Tensor:
        """The threshold as an op takes it: a device scalar, which a CPU call does without while it is 0."""
        # is_compiling comes first: a graph that read the flag would be compiled again when it changes
        on_device = torch.compiler.is_compiling() or self._thresholded or self.gate.is_cuda
        return self._kappa if on_device else 0.0

    def weight_rows(self) -> tuple[Tensor, int]:
        """The parameter that holds `weight`, and the first of its rows that are the weight's."""
        return self.weight, 0

    def drops_out(self) -> bool:
        """Whether dropout acts on this call."""
        return self.training and self.dropout > 0

    def _update(self, x: Tensor) -> Tensor:
        """The update alone, [..., N], dropout included."""
        dropped = nn.functional.dropout(x, self.dropout) if self.drops_out() else x
        s = nn.functional.linear(dropped, self.lora_a.to(x.dtype))
        g = self.scaling * reference.soft_threshold(self.gate, self.call_kappa())
        return nn.functional.linear((s * g).to(s.dtype), self.lora_b.to(x.dtype))

    def effective_gate(self) -> Tensor:
        """soft_threshold(gate, kappa), [R], float32, detached."""
        return reference.soft_threshold(self.gate.detach(), self._kappa_value)

    def active_rank(self) -> int:
        """Number of gates with |gate| > kappa."""
        return int((self.gate.detach().abs() > self._kappa_value).sum())

    def delta_weight(self) -> Tensor:
        """The update that a merge would add, [N, K], float32.

        scaling * lora_b @ diag(soft_threshold(gate, kappa)) @ lora_a
        """
        lora_a, lora_b = self.lora_a.detach().float(), self.lora_b.detach().float()
        return self.scaling * ((lora_b * self.effective_gate()) @ lora_a)

    @torch.no_grad()
    def prune_(self) -> int:
        """Drop the ranks with |gate| <= kappa; the outputs do not change.

        Returns:
            The kept rank; 0 is legal, and leaves the frozen layer alone at work.
        Raises:
            ValueError: a gate is not finite, or the adapter is sharded; nothing is dropped.
        """
        self.check_whole()
        check_finite_gate(self.gate)
        keep = self.gate.abs() > self._kappa_value
        if not bool(keep.all()):
            self.keep_ranks_(keep.nonzero().flatten())
        return self.gate.numel()

    def check_whole(self) -> None:
        """Raises ValueError where the adapter's parameters are shared among processes (DTensor)."""
        if hasattr(self.gate, "device_mesh"):
            raise ValueError(
                "the adapter is sharded, and ranks are dropped from whole ones alone. Give fully_shard "
                "ignored_params=set(fastlora.adapter_parameters(model))."
            )

    @torch.no_grad()
    def keep_ranks_(self, ranks: Tensor) -> None:
        """Keep these ranks and drop the others, whatever they contribute.

        Args:
            ranks: [kept], int64, on the adapter's device.
        """
        lora_a, lora_b = self.lora_a.index_select(0, ranks), self.lora_b.index_select(1, ranks)
        self._set(lora_a, lora_b, self.gate.index_select(0, ranks))

    @one_at_a_time
    def merge_(
        self, *, generator: torch.Generator | None = None, **merge_kwargs: Unpack[LayerMergeOptions]
    ) -> MergeReport:
        """weight += delta_weight() in place, rounded once; then a fresh adapter of the original rank.

        Args:
            generator: draws the fresh adapter.
            merge_kwargs: passed to `fastlora.ops.merge_` (rounding, seed, residuals, check).
        Returns:
            A report on this one module.
        Raises:
            MergeError: the adapter is not finite or the sum overflows; weight and adapter are unchanged.
            ValueError: a gate is not finite.
        """
        check_finite_gate(self.gate)
        fresh = self.fresh_tensors(generator)  # before the merge: whatever fails here, nothing has changed
        with uninterrupted():
            report = merge_(
                [self.weight], [self.lora_a], [self.lora_b], [self.effective_gate()], scaling=self.scaling,
                **merge_kwargs,
            )  # fmt: skip
            self._set(*fresh)
        return report

    @torch.no_grad()
    def reset_adapter_(self, generator: torch.Generator | None = None) -> None:
        """A fresh adapter of the original rank: lora_a Kaiming-uniform (a = sqrt 5), lora_b 0, gate N(0, 1) or 1.

        Drawn on the CPU, lora_a before gate, so that a seed gives the same adapter on every device.

        Args:
            generator: of the CPU; None for torch's global one.
        """
        if not self.gate.is_meta:  # nothing to fill; called again once the module has storage
            self._set(*self.fresh_tensors(generator))

    @torch.no_grad()
    def fresh_tensors(self, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """lora_a, lora_b and gate as `reset_adapter_` draws them; the adapter itself stays as it is."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        lora_a = torch.empty(self.rank, self.in_features).uniform_(-bound, bound, generator=generator)
        gate = torch.ones(self.rank)
        if self.gate_init == "normal":
            gate.normal_(generator=generator)
        values = zip((lora_a, torch.zeros(self.out_features, self.rank), gate), (self.lora_a, self.lora_b, self.gate))
        lora_a, lora_b, gate = (value.to(parameter.device, parameter.dtype) for value, parameter in values)
        return lora_a, lora_b, gate

    def extra_repr(self) -> str:
        kept = self.gate.numel()
        rank = f"rank={self.rank}" if kept == self.rank else f"rank={self.rank}, kept={kept}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {rank}, kappa={self.kappa:g}, "
            f"scaling={self.scaling:g}, backend={self.backend!r}"
        )


@torch.no_grad()
def _set_shard(parameter: Any, value: Tensor) -> None:
    """Into the share of a DTensor that this process holds, in place: the memory belongs to what dealt it out."""
    from torch.distributed.tensor import distribute_tensor

    share = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.to_local().copy_(share.to_local())
