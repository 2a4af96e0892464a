"""The ways of running one call: random operands, the candidates, and the check of what each returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastlora import reference
from fastlora.ops import rank_lora_torch
from fastlora.ops.backend import ONE_PASS_MAX_RANK, TRITON_VARIANTS
from fastlora.tune.calls import Call

if TYPE_CHECKING:
    from fastlora.triton_kernels import TileConfig

Run = Callable[[], Tensor]

KAPPA = 0.1


@dataclass(frozen=True)
class Candidate:
    """What may run a call; str() is one line.

    Attributes:
        variant: as `fastlora.explain` names it.
        tile: of its GEMM; None for the kernel layer's own rule, and for "library", which has none.
    """

    variant: str
    tile: TileConfig | None = None

    def __str__(self) -> str:
        # without its last word, what the tile was tuned on
        return self.variant + (f" {str(self.tile).partition(' (')[0]}" if self.tile else "")


class Operands:
    """Random tensors for one call, scaled so that outputs are near 1."""

    def __init__(self, call: Call, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)  # the caller's random stream must not notice

        def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = call.dtype) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).mul_(scale).to(dtype)

        m, n, k, r = call.m, call.n, call.k, call.r
        widest = max(call.ranks or (r,))
        self.ranks = call.ranks
        self.x, self.dy = normal(m, k), normal(m, n, scale=max(n, 1) ** -0.5)
        self.weight, self.bias = normal(n, k, scale=max(k, 1) ** -0.5), normal(n)
        self.lora_a = normal(r, k, scale=max(k, 1) ** -0.5)
        # flat where it is packed
        b_shape = (n // 3 * r,) if call.ranks else (n, r)
        self.lora_b = normal(*b_shape, scale=max(widest, 1) ** -0.5)
        self.gate = normal(r, dtype=torch.float32)
        self.kappa = torch.full((), KAPPA, device=device)
        # what the kernel for the adapter's gradients leaves behind in a backward pass
        self.p = rank_lora_torch.project_back(self.dy, self.lora_b, call.ranks)

    def parts(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Of each projection: its rows of weight, its ranks, its lora_b [N, R]."""
        ranks = self.ranks or (self.gate.shape[0],)
        width, first = self.weight.shape[0] // len(ranks), 0
        for part, r in enumerate(ranks):
            up = self.lora_b.reshape(-1)[width * first : width * (first + r)].view(width, r)
            yield slice(part * width, (part + 1) * width), slice(first, first + r), up
            first += r


def default_candidates(call: Call, role: str, device: torch.device) -> list[Candidate]:
    """The library, and every variant that can hold the ranks with every tile for the device.

    In a backward pass p is there already and all variants of dx are one launch, "split".
    """
    from fastlora.triton_kernels import common, tiles
    from fastlora.triton_kernels.rank_lora_tma import serves_ranks

    like = torch.empty(0, dtype=call.dtype, device=device)
    one_launch = role == "dx" or max(call.ranks or (call.r,)) > ONE_PASS_MAX_RANK
    described = serves_ranks(common.architecture(like), call.ranks if role == "fwd" and call.ranks else (call.r,))
    found = [Candidate("library")]
    for variant in ("split",) if one_launch else TRITON_VARIANTS:
        for kernel in ("gemm", "tma_gemm") if variant == "split" else ("one_pass", "tma_one_pass"):
            configs = tiles.tile_configs(kernel, common.compute_type(like), common.architecture(like))
            # two sizes may be one tile
            found += [Candidate(variant, tile) for tile in dict.fromkeys(configs.values()) if described or not tile.tma]
    return found


def make_run(candidate: Candidate, role: str, o: Operands) -> Run:
    """A function that runs the candidate as the op does, and returns y or dx."""
    if candidate.variant == "library":
        return (lambda: _library_fwd(o)) if role == "fwd" else (lambda: _library_dx(o))
    from fastlora import triton_kernels

    options: dict[str, Any] = {"ranks": o.ranks, "variant": candidate.variant, "tile": candidate.tile}
    adapter = (o.lora_a, o.lora_b, o.gate, o.kappa, 1.0)
    if role == "fwd":
        return lambda: triton_kernels.rank_lora_fwd(o.x, o.weight, o.bias, *adapter, **options)[0]
    return lambda: triton_kernels.rank_lora_dx(o.dy, o.weight, *adapter, p=o.p, **options)[0]


def _library_fwd(o: Operands) -> Tensor:
    return rank_lora_torch.rank_lora_fwd(o.x, o.weight, o.bias, o.lora_a, o.lora_b, o.gate, o.kappa, 1.0, o.ranks)[0]


def _library_dx(o: Operands) -> Tensor:
    gated = rank_lora_torch.times_gate(o.p, rank_lora_torch.effective_gate(o.gate, o.kappa, 1.0))
    return torch.mm(o.dy, o.weight).addmm_(gated, o.lora_a)


class Check:
    """Whether a result is as exact as PyTorch's: error against float64 at most twice that of the formula in its dtype."""

    def __init__(self, role: str, o: Operands) -> None:
        dtype = o.x.dtype
        self._truth = _formula(role, o, torch.float64)
        # the floor is an eighth of a rounding, plus sums in float32 in another order
        floor = torch.finfo(dtype).eps / 8 + 4 * torch.finfo(torch.float32).eps
        self._limit = 2 * self._error(_formula(role, o, dtype)) + floor

    def why_wrong(self, result: Tensor) -> str | None:
        """The reason that `result` cannot be trusted, or None."""
        if result.shape != self._truth.shape:
            return f"its result has shape {list(result.shape)} instead of {list(self._truth.shape)}"
        error = self._error(result)
        # so put that a NaN is wrong too
        return None if error <= self._limit else f"its error is {error:.2g}, over the limit of {self._limit:.2g}"

    def _error(self, result: Tensor) -> float:
        return float((result - self._truth).norm() / self._truth.norm().clamp_min(torch.finfo(torch.float64).tiny))


def _formula(role: str, o: Operands, dtype: torch.dtype) -> Tensor:
    """y or dx by the definition, computed in `dtype`."""
    gate = o.gate.double() if dtype == torch.float64 else o.gate
    x, dy, weight, bias, lora_a = (t.to(dtype) for t in (o.x, o.dy, o.weight, o.bias, o.lora_a))
    outputs = []
    for rows, own, up in o.parts():
        up = up.to(dtype)
        if role == "fwd":
            y = reference.rank_lora_linear(x, weight[rows], bias[rows], lora_a[own], up, gate[own], KAPPA)
        else:  # the forward with weight -> weight.T, lora_a -> lora_b.T, lora_b -> lora_a.T
            back = weight[rows].t(), None, up.t(), lora_a[own].t()
            y = reference.rank_lora_linear(dy[:, rows], *back, gate[own], KAPPA)
        outputs.append(y)
    return torch.cat(outputs, 1) if role == "fwd" else torch.stack(outputs).sum(0)
