"""The shapes that benchmarks run on. M rows, K in, N out; R is the rank."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """One linear layer under load; parts = 3: q, k and v packed, N = 3 d, with an adapter of rank R each."""

    name: str
    m: int
    k: int
    n: int
    r: int = 16
    parts: int = 1

    def __str__(self) -> str:
        packed = f"x{self.parts}" if self.parts > 1 else ""
        return f"{self.name}-{self.m}x{self.k}x{self.n}r{self.r}{packed}"

    def flops(self, mode: str) -> int:
        """Operations that "forward", "backward" or "both" must do; the base weight is frozen, so it has no gradient."""
        base = 2 * self.m * self.k * self.n
        down, up = 2 * self.m * self.r * self.parts * self.k, 2 * self.m * self.r * self.n
        forward, backward = base + down + up, base + 2 * (down + up)
        return {"forward": forward, "backward": backward, "both": forward + backward}[mode]

    def bytes(self, mode: str, element: int, base_only: bool = False) -> int:
        """Fewest bytes moved: each input read once, each output written once; gradients of the adapter are float32."""
        m, k, n, ranks = self.m, self.k, self.n, self.r * self.parts
        if base_only:
            return element * (m * k + n * k + n + m * n)
        adapter = ranks * k + self.r * n
        forward = element * (m * k + n * k + n + adapter + m * n + m * ranks) + 4 * ranks
        backward = element * (m * n + 2 * m * k + n * k + adapter + m * ranks) + 4 * (adapter + 2 * ranks)
        return {"forward": forward, "backward": backward, "both": forward + backward}[mode]


# four images of ViT-B/16, 197 tokens each: the attention's projections and the first feed-forward layer
CPU_SHAPES = (Shape("b16-proj", 788, 768, 768), Shape("b16-fc1", 788, 768, 3072))
SMALL_SHAPES = (Shape("small-proj", 20, 48, 48, 4), Shape("small-fc1", 20, 48, 96, 4))

# 64 images of ViT-B/16: q, k, v and out alone, q, k and v in one product, and the feed-forward layers
B16_SHAPES = (
    Shape("b16-proj", 12608, 768, 768),
    Shape("b16-qkv", 12608, 768, 2304, parts=3),
    Shape("b16-fc1", 12608, 768, 3072),
    Shape("b16-fc2", 12608, 3072, 768),
)
GPU_SHAPES = (
    *B16_SHAPES,
    Shape("l14-fc1", 16448, 1024, 4096),
    Shape("text-fc1", 7700, 512, 2048),
    Shape("llm", 8192, 4096, 4096),
    Shape("llm-up", 8192, 4096, 14336),
)
# LoRAFusion's kernel benchmark: square layers, rank 16, 2048 to 8192 tokens in steps of 256, of which these are three
LORAFUSION_SHAPES = tuple(Shape("lorafusion", m, d, d) for d in (4096, 5120, 8192) for m in (2048, 4096, 8192))

# the same names, so that every goal has its shapes in a small run too
_SMALL = {"b16-proj": (9, 16, 16), "b16-qkv": (9, 16, 48), "b16-fc1": (9, 16, 40), "b16-fc2": (9, 40, 16)}
SMALL_GPU_SHAPES = (
    *(Shape(s.name, *_SMALL[s.name], 3, s.parts) for s in B16_SHAPES),
    Shape("llm", 9, 24, 24, 3),
)
SMALL_LORAFUSION_SHAPES = (Shape("lorafusion", 9, 24, 24, 3),)


def cpu_shapes(small: bool) -> tuple[Shape, ...]:
    return SMALL_SHAPES if small else CPU_SHAPES


def gpu_shapes(small: bool) -> tuple[Shape, ...]:
    return SMALL_GPU_SHAPES if small else GPU_SHAPES


def lorafusion_shapes(small: bool) -> tuple[Shape, ...]:
    return SMALL_LORAFUSION_SHAPES if small else LORAFUSION_SHAPES


def module_shapes(blocks: int = 12, widths: tuple[int, ...] = (768, 512)) -> list[tuple[int, int]]:
    """[N, K] of the adapted matrices of CLIP ViT-B/16: q, k, v, out, c_fc, c_proj of every block, both towers."""
    per_block = [[(d, d)] * 4 + [(4 * d, d), (d, 4 * d)] for d in widths]
    return [shape for tower in per_block for _ in range(blocks) for shape in tower]
