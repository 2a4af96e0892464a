"""The shapes that benchmarks run on. M rows, K in, N out; R is the rank."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """One linear layer under load."""

    name: str
    m: int
    k: int
    n: int
    r: int = 16

    def __str__(self) -> str:
        return f"{self.name}-{self.m}x{self.k}x{self.n}r{self.r}"


# four images of ViT-B/16, 197 tokens each: the attention's projections and the first feed-forward layer
CPU_SHAPES = (Shape("b16-proj", 788, 768, 768), Shape("b16-fc1", 788, 768, 3072))
SMALL_SHAPES = (Shape("small-proj", 20, 48, 48, 4), Shape("small-fc1", 20, 48, 96, 4))


def cpu_shapes(small: bool) -> tuple[Shape, ...]:
    return SMALL_SHAPES if small else CPU_SHAPES
