"""What a rival is given, what it gives back, and the check of its result before anything is timed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from shapes import Shape
from torch import Tensor

from fastlora import reference

Adapter = tuple[Tensor, Tensor, Tensor]  # lora_a [R, K], lora_b [N, R], gate [R]


class Absent(Exception):
    """A rival that cannot run here; str() says why."""


@dataclass
class Operands:
    """One problem. adapters: (lora_a, lora_b, gate) of each part. xs, dys: equal problems that a benchmark rotates."""

    shape: Shape
    weight: Tensor
    bias: Tensor
    adapters: list[Adapter]
    xs: list[Tensor]
    dys: list[Tensor]

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def rows(self, part: int) -> slice:
        """Rows of the weight that belong to a part."""
        width = self.shape.n // self.shape.parts
        return slice(part * width, (part + 1) * width)


def make_operands(
    shape: Shape, dtype: torch.dtype, device: torch.device | str, *, rotations: int = 1, seed: int = 0
) -> Operands:
    """Random operands, outputs near 1. The adapter is rounded to `dtype`, so that every rival gets equal values."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, scale: float = 1.0, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).mul_(scale).to(of)

    m, k, n, r, parts = shape.m, shape.k, shape.n, shape.r, shape.parts
    width = n // parts
    adapters = [
        (normal(r, k, scale=k**-0.5), normal(width, r, scale=r**-0.5), normal(r, of=torch.float32))
        for _ in range(parts)
    ]
    weight, bias = normal(n, k, scale=k**-0.5), normal(n)
    xs = [normal(m, k).requires_grad_() for _ in range(rotations)]
    return Operands(shape, weight, bias, adapters, xs, [normal(m, n, scale=n**-0.5) for _ in range(rotations)])


@dataclass
class Case:
    """A rival over operands. call(x) -> outputs: one [M, N], or one of each part; leaves: what it trains."""

    name: str
    operands: Operands
    call: Callable[[Tensor], tuple[Tensor, ...]]
    leaves: list[Tensor]
    checked: bool = True
    note: str = ""
    _dys: list[tuple[Tensor, ...]] = field(default_factory=list)

    def forward(self, i: int = 0) -> tuple[Tensor, ...]:
        return self.call(self.operands.xs[i])

    def both(self, i: int = 0) -> tuple[Tensor, ...]:
        """Forward, then the gradients of x and of every leaf."""
        return self._grad(self.forward(i), i)

    def backward(self, i: int = 0) -> Callable[[], tuple[Tensor, ...]]:
        """The backward alone of a forward that runs now."""
        outputs = self.forward(i)
        return lambda: self._grad(outputs, i, retain_graph=True)

    def _grad(self, outputs: tuple[Tensor, ...], i: int, **options: bool) -> tuple[Tensor, ...]:
        wanted = [self.operands.xs[i], *self.leaves]
        return torch.autograd.grad(outputs, wanted, self._gradients_of(outputs, i), **options)

    def _gradients_of(self, outputs: tuple[Tensor, ...], i: int) -> tuple[Tensor, ...]:
        if not self._dys:  # contiguous, as separate layers would get them
            self._dys = [
                (dy,) if len(outputs) == 1 else tuple(piece.contiguous() for piece in dy.chunk(len(outputs), 1))
                for dy in self.operands.dys
            ]
        return self._dys[i]


class Check:
    """y and dx of a rival against float64: an error of at most twice that of the formula in the dtype at hand."""

    def __init__(self, operands: Operands, *, gradient: bool = True) -> None:
        self._operands, self._gradient = operands, gradient
        self._truth = formula(operands, torch.float64, gradient)
        eps = torch.finfo(operands.dtype).eps
        floor = eps / 8 + 4 * torch.finfo(torch.float32).eps
        plain = formula(operands, operands.dtype, gradient)
        self._limits = [2 * relative_error(p, t) + floor for p, t in zip(plain, self._truth)]

    def worst(self, case: Case) -> float:
        """Largest error of `case` over its limit.

        Raises:
            AssertionError: it is above 1.
        """
        outputs = case.forward(0)
        found = [torch.cat([y.detach() for y in outputs], 1)]
        del outputs
        if self._gradient:
            found.append(case.both(0)[0])
        shares = [relative_error(f, t) / limit for f, t, limit in zip(found, self._truth, self._limits)]
        # so put that a NaN is wrong too
        wrong = [f"{name} {share:.2f}" for name, share in zip(("y", "dx"), shares) if not share <= 1]
        if wrong:
            raise AssertionError(f"{case.name} computes something else: error over its limit is {', '.join(wrong)}")
        return max(shares)


def formula(operands: Operands, dtype: torch.dtype, gradient: bool = True) -> list[Tensor]:
    """y, and dx if asked for, by the definition in `dtype`."""
    x = operands.xs[0].detach().to(dtype).requires_grad_(gradient)
    pieces = []
    for part, (lora_a, lora_b, gate) in enumerate(operands.adapters):
        rows = operands.rows(part)
        gate = gate.double() if dtype == torch.float64 else gate
        weight, bias, a, b = (t.to(dtype) for t in (operands.weight[rows], operands.bias[rows], lora_a, lora_b))
        pieces.append(reference.rank_lora_linear(x, weight, bias, a, b, gate))
    y = torch.cat(pieces, 1)
    if not gradient:
        return [y]
    return [y.detach(), *torch.autograd.grad(y, x, operands.dys[0].to(dtype))]


def relative_error(found: Tensor, truth: Tensor) -> float:
    """||found - truth|| / ||truth||; NaN where anything is."""
    return float((found.double() - truth).norm() / truth.norm().clamp_min(math.ulp(0.0)))
