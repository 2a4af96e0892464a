"""Tile configs: one table, one factory (`tile_configs`), and the rule that picks from it. Nothing is autotuned in the hot path.

No entry has been timed on a GPU yet: each was chosen so that it compiles without spills within the shared memory of its
target, which `python -m fastlora.triton_kernels.aot` checks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from fastlora.triton_kernels.common import INTERPRETER, architecture, compute_type, is_aligned, rows_aligned

UNTUNED = "untuned: no GPU measured yet"
SMALL = "interpreter: small, so that tests cross tile edges"

# most ranks of a projection in the one-pass and leader variants
ONE_PASS_MAX_RANK = 64
# most ranks of a projection in the kernels that read x and dy once
ONE_READ_RANKS = 64


@dataclass(frozen=True)
class TileConfig:
    """Tile of one kernel.

    gemm, one_pass, tma_gemm, tma_one_pass: [block_m, block_n] of y per program, block_k of K a step.
    project: [block_m, all ranks] per program, block_k a step.
    grad: [block_n columns, all ranks] per program, block_m rows a step.
    one_read: block_m rows and all ranks per program, block_n columns of dy and block_k of x a step.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    tuned_on: str = UNTUNED
    tma: bool = False

    def __str__(self) -> str:
        blocks = "x".join(str(block) for block in (self.block_m, self.block_n, self.block_k) if block)
        kind = ", descriptors" if self.tma else ""
        return f"{blocks}, {self.num_warps} warps, {self.num_stages} stages{kind} ({self.tuned_on})"

    @property
    def launch(self) -> dict[str, int | bool]:
        """Launch options; fp fusion is named because its default differs between Triton versions."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


# Size classes, gemm: large to small, and ragged; project and grad: narrow (R <= 64), wide, and ragged. Ragged serves
# operands that are not aligned: element-wise loads hold two registers an address, so the tile has to be small.
_RAGGED_HALF = {
    "gemm": {"ragged": TileConfig(64, 64, 32, 4, 2)},
    "one_pass": {"ragged": TileConfig(16, 64, 32, 8, 2)},
    "project": {"ragged": TileConfig(32, 0, 32, 8, 2)},
    "grad": {"ragged": TileConfig(32, 32, 0, 8, 2)},
    "one_read": {"ragged": TileConfig(32, 32, 32, 8, 2)},
}
_RAGGED_SINGLE = {
    "gemm": {"ragged": TileConfig(32, 32, 16, 4, 3)},
    "one_pass": {"ragged": TileConfig(16, 16, 16, 4, 2)},
    "project": {"ragged": TileConfig(16, 0, 16, 8, 2)},
    "grad": {"ragged": TileConfig(16, 16, 0, 8, 2)},
    "one_read": {"ragged": TileConfig(16, 16, 16, 8, 1)},
}
_SM80 = {
    "gemm": {"large": TileConfig(128, 128, 32, 8, 4), "small": TileConfig(64, 64, 64, 4, 3)},
    "one_pass": {"large": TileConfig(128, 128, 32, 8, 3), "small": TileConfig(64, 64, 64, 8, 3)},
    "project": {"narrow": TileConfig(64, 0, 64, 4, 3), "wide": TileConfig(64, 0, 32, 8, 3)},
    "grad": {"narrow": TileConfig(64, 64, 0, 4, 3), "wide": TileConfig(32, 64, 0, 8, 3)},
    "one_read": {
        "narrow": TileConfig(64, 32, 32, 8, 3),
        "short": TileConfig(32, 32, 32, 8, 3),
        "wide": TileConfig(64, 32, 32, 8, 3),
    },
}
_SM90 = {
    "gemm": {
        "large": TileConfig(128, 256, 64, 8, 3),
        "medium": TileConfig(128, 128, 64, 8, 4),
        "small": TileConfig(64, 64, 64, 4, 4),
    },
    "one_pass": {
        "large": TileConfig(128, 256, 64, 8, 3),
        "medium": TileConfig(128, 128, 64, 8, 3),
        "small": TileConfig(64, 64, 64, 8, 4),
    },
    "project": {"narrow": TileConfig(64, 0, 64, 4, 4), "wide": TileConfig(64, 0, 64, 8, 3)},
    "grad": {"narrow": TileConfig(64, 64, 0, 4, 4), "wide": TileConfig(64, 64, 0, 8, 3)},
    "one_read": {
        "narrow": TileConfig(128, 64, 64, 8, 4),
        "short": TileConfig(64, 64, 64, 8, 3),
        "wide": TileConfig(128, 64, 64, 8, 4),
    },
}
_GFX942 = {
    "gemm": {"large": TileConfig(128, 128, 32, 8, 2), "small": TileConfig(64, 64, 32, 4, 2)},
    # few elements a thread: each mask of an element-wise load takes two scalar registers
    "one_pass": {
        "large": TileConfig(128, 128, 32, 8, 2),
        "small": TileConfig(16, 64, 32, 4, 2),
        "ragged": TileConfig(16, 32, 16, 4, 2),
    },
    "project": {"narrow": TileConfig(64, 0, 64, 4, 2), "wide": TileConfig(64, 0, 32, 8, 2)},
    "grad": {"narrow": TileConfig(64, 64, 0, 4, 2), "wide": TileConfig(32, 64, 0, 8, 2)},
}
# 256 columns beside 16 ranks want 528 columns of tensor memory from Triton 3.6; there are 512
_SM100_ONE_PASS = _SM90["one_pass"] | {"large": TileConfig(128, 128, 64, 8, 4)}
_SM100_ONE_READ = {"short": TileConfig(64, 32, 32, 8, 2), "ragged": TileConfig(16, 32, 32, 8, 2)}
_SM100 = _SM90 | {"one_pass": _SM100_ONE_PASS, "one_read": _SM90["one_read"] | _SM100_ONE_READ}
_HALF = {"sm_80": _SM80, "sm_90": _SM90, "sm_100": _SM100, "gfx942": _GFX942}
# a dot of float32 is plain FMAs: short steps keep its operands in registers
_FP32 = {
    "gemm": {"large": TileConfig(64, 64, 16, 4, 3), "small": TileConfig(32, 32, 16, 4, 3)},
    "one_pass": {"large": TileConfig(64, 64, 16, 8, 3), "small": TileConfig(16, 16, 16, 4, 3)},
    "project": {"narrow": TileConfig(32, 0, 16, 4, 3), "wide": TileConfig(32, 0, 16, 8, 3)},
    "grad": {"narrow": TileConfig(16, 32, 0, 4, 3), "wide": TileConfig(16, 16, 0, 8, 3)},
    "one_read": {"narrow": TileConfig(32, 16, 16, 8, 2)},
}
# with 4 warps it spills on Triton 3.9 there, and with 8 on 3.6 elsewhere
_FP32_SM100 = {"one_pass": {"small": TileConfig(16, 16, 16, 8, 3)}}
_TF32 = {
    "gemm": {"large": TileConfig(128, 128, 32, 8, 3), "small": TileConfig(64, 64, 32, 8, 3)},
    "one_pass": {"large": TileConfig(64, 128, 32, 8, 3), "small": TileConfig(64, 64, 32, 8, 3)},
    "project": {"narrow": TileConfig(64, 0, 32, 4, 3), "wide": TileConfig(64, 0, 16, 8, 2)},
    "grad": {"narrow": TileConfig(32, 64, 0, 4, 3), "wide": TileConfig(16, 64, 0, 8, 3)},
    "one_read": {
        "narrow": TileConfig(64, 32, 32, 8, 3),
        "short": TileConfig(32, 32, 32, 8, 3),
        "wide": TileConfig(64, 32, 32, 8, 3),
    },
}
_INTERPRETED = {
    "gemm": {"ragged": TileConfig(32, 32, 32, 1, 1, group_m=2, tuned_on=SMALL)},
    "one_pass": {"ragged": TileConfig(32, 32, 32, 1, 1, group_m=2, tuned_on=SMALL)},
    "project": {"ragged": TileConfig(32, 0, 32, 1, 1, tuned_on=SMALL)},
    "grad": {"ragged": TileConfig(32, 32, 0, 1, 1, tuned_on=SMALL)},
    "one_read": {"ragged": TileConfig(32, 32, 32, 1, 1, tuned_on=SMALL)},
}


# persistent kernels that read by descriptors (`tma`): rank blocks up to 64, but "large" of one_pass up to 16
_TMA = {
    "sm_90": {
        "tma_gemm": {
            "large": TileConfig(128, 256, 64, 8, 3, tma=True),
            "medium": TileConfig(128, 128, 64, 8, 4, tma=True),
            "small": TileConfig(64, 128, 64, 4, 4, tma=True),
        },
        "tma_one_pass": {
            "large": TileConfig(128, 256, 64, 8, 3, tma=True),
            "medium": TileConfig(128, 128, 64, 8, 3, tma=True),
        },
    },
    "sm_100": {
        "tma_gemm": {
            "large": TileConfig(128, 256, 64, 8, 3, tma=True),
            "medium": TileConfig(128, 128, 64, 8, 3, tma=True),
        },
        "tma_one_pass": {
            "large": TileConfig(64, 128, 64, 8, 4, tma=True),
            "medium": TileConfig(64, 64, 32, 8, 3, tma=True),
        },
    },
}
_INTERPRETED |= dict.fromkeys(
    ("tma_gemm", "tma_one_pass"), {"small": TileConfig(32, 32, 32, 1, 1, group_m=2, tuned_on=SMALL, tma=True)}
)


def tile_configs(kernel: str, compute: str, arch: str) -> dict[str, TileConfig]:
    """All shipped configs of a kernel, as `TileConfig` names them, by size class; the only place they come from."""
    if kernel.startswith("tma_") and (compute not in ("fp16", "bf16") or arch not in (*_TMA, INTERPRETER)):
        return {}
    if arch == INTERPRETER:
        return _INTERPRETED[kernel]
    if kernel.startswith("tma_"):
        return _TMA[arch][kernel]
    if kernel == "one_read" and arch == "gfx942":
        return {}  # each one tried spills: the masks of its loads take more scalar registers than there are
    if compute in ("fp32", "tf32"):
        own = _FP32_SM100.get(kernel, {}) if (compute, arch) == ("fp32", "sm_100") else {}
        return (_FP32 if compute == "fp32" else _TF32)[kernel] | _RAGGED_SINGLE[kernel] | own
    return _RAGGED_HALF[kernel] | _HALF[arch][kernel]


def pick_gemm_tile(
    x: torch.Tensor, weight: torch.Tensor, variant: str = "split", ranks: tuple[int, ...] = (0,)
) -> TileConfig:
    """For x @ weight.T: the largest tile that still gives 128 programs, about one per multiprocessor, else "small".

    `ranks` of each projection in `weight`. The variants that hold all of them have "large" for 16 or none: it leaves no
    registers for more, nor for loads of one element at a time.
    """
    holds_ranks = variant != "split"
    tiles = tile_configs("one_pass" if holds_ranks else "gemm", compute_type(x), architecture(x))
    m, n = x.shape[0], weight.shape[0] // len(ranks)
    # M is not specialized on, so x must run along K
    if "small" not in tiles or not (rows_aligned(x, 1) and is_aligned(weight) and n % 16 == 0):
        return tiles["ragged"]
    for size in ("medium",) if holds_ranks and not {0, 16}.issuperset(ranks) else ("large", "medium"):
        tile = tiles.get(size)
        if tile and triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n) * len(ranks) >= 128:
            return tile
    return tiles["small"]


def pick_tma_tile(x: torch.Tensor, weight: torch.Tensor, variant: str, ranks: tuple[int, ...]) -> TileConfig:
    """The same rule for the descriptor kernels; ask `rank_lora_tma.why_not_tma` first."""
    kernel = "tma_gemm" if variant == "split" else "tma_one_pass"
    configs = tile_configs(kernel, compute_type(x), architecture(x))
    m, n = x.shape[0], weight.shape[0] // len(ranks)
    sizes = [size for size in configs if size != "large" or variant == "split" or {0, 16}.issuperset(ranks)]
    for size in sizes:  # from large to small
        tile = configs[size]
        if triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n) * len(ranks) >= 128:
            return tile
    return configs[sizes[-1]]


def pick_rank_tile(kernel: str, r: int, *rows: torch.Tensor, aligned: bool = True) -> TileConfig:
    """For the kernels that hold all ranks at once ("project", "grad") and read `rows`, each [M, K] or [M, N].

    `r` is the largest rank of a projection; `aligned` says that 16 divides the others.
    """
    tiles = tile_configs(kernel, compute_type(rows[0]), architecture(rows[0]))
    size = "narrow" if r <= 64 else "wide" if aligned and r % 16 == 0 else "ragged"
    return tiles[size] if size in tiles and all(rows_aligned(t, 1) for t in rows) else tiles["ragged"]


def pick_one_read_tile(r: int, x: torch.Tensor, dy: torch.Tensor) -> TileConfig | None:
    """For the sums that read x and dy once, at most `r` ranks a projection; None where no tile serves."""
    tiles = tile_configs("one_read", compute_type(x), architecture(x))
    if r > ONE_READ_RANKS or not tiles:
        return None
    if "narrow" not in tiles or not (rows_aligned(x, 1) and rows_aligned(dy, 1)):
        return tiles["ragged"]
    # fewer rows a program where the narrow tile would leave half of a device idle
    few_blocks = "short" in tiles and triton.cdiv(x.shape[0], tiles["narrow"].block_m) < 64
    if r <= 16 and not few_blocks:
        return tiles["narrow"]
    # more than 16 ranks that are loaded element by element take registers, too
    return tiles.get("short" if few_blocks or r % 16 != 0 else "wide")


def rank_block(r: int) -> int:
    """Ranks of a kernel that holds all at once: the power of two that holds `r`, at least 16, the least a dot takes."""
    return max(triton.next_power_of_2(r), 16)


def rank_step(r: int, *tensors: torch.Tensor, aligned: bool = True) -> int:
    """Ranks per step of the GEMM's rank product: 16 where more would spill (float32, element-wise loads)."""
    return min(rank_block(r), 64 if aligned and tensors[0].dtype != torch.float32 and is_aligned(*tensors) else 16)
