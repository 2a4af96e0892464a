"""What every kernel file shares: small jit helpers, tile configs, device facts.

Tile configs come from one factory, `tile_configs`; nothing is autotuned in the hot path. No entry has been timed on a
GPU yet: each was chosen so that it compiles without spills within the shared memory of its target, which
`python -m fastlora.triton_kernels.aot` checks.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

UNTUNED = "untuned: no GPU measured yet"
SMALL = "interpreter: small, so that tests cross tile edges"
MAX_RANK = 256
# offsets along one dimension are 32 bits and run up to a tile past its end; products with strides are 64 bits
MAX_SIDE = 2**31 - 1024
INTERPRETER = "interpreter"
COMPUTE_TYPES = ("fp16", "bf16", "fp32", "tf32")

# Decided where Triton decides it: when a kernel is decorated. Kernels read it as a compile-time constant.
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


def is_interpreted() -> bool:
    """True if the kernels of this process run in Triton's interpreter, so that CPU tensors are legal for a launcher."""
    return bool(INTERPRETED.value)


# ---- jit helpers


@triton.jit
def tile_ptrs(base, rows, stride_row, cols, stride_col):
    # 64 bits: rows * stride_row passes 2^31 in a tensor of that many elements  # [rows, cols]
    return base + (rows.to(tl.int64)[:, None] * stride_row + cols.to(tl.int64)[None, :] * stride_col)


@triton.jit
def advance(ptrs, steps: tl.constexpr, stride):
    # 64 bits: in a transposed x the stride of k is M, so steps * stride alone can pass 2^31
    return ptrs + tl.cast(stride, tl.int64) * steps


@triton.jit
def grouped_program(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    # GROUP_M row tiles share each column tile while it is in L2
    num_m = tl.cdiv(M, BLOCK_M)
    num_n = tl.cdiv(N, BLOCK_N)
    first_m = pid // (GROUP_M * num_n) * GROUP_M
    size_m = min(num_m - first_m, GROUP_M)
    in_group = pid % (GROUP_M * num_n)
    return first_m + in_group % size_m, in_group // size_m


@triton.jit
def soft_threshold(gate, kappa):
    # kappa = 0 is the identity, also at gate = 0; NaN stays NaN
    shrunk = tl.where(gate > 0, gate - kappa, gate + kappa)
    return tl.where(is_dead(gate, kappa), 0.0, shrunk)


@triton.jit
def is_dead(gate, kappa):
    # exactly |gate| = kappa is dead, unless kappa = 0
    # broadcast before comparing: the interpreter makes a float of a boolean scalar that it broadcasts
    kappa = tl.broadcast_to(kappa, gate.shape)
    return (tl.abs(gate) <= kappa) & (kappa > 0.0)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED:  # numpy has no bfloat16: the interpreter would multiply bit patterns
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def round_to(value, dtype: tl.constexpr):
    # float32 -> dtype, to nearest even
    if INTERPRETED:
        if dtype == tl.bfloat16:  # the interpreter cuts off: add what makes that round; a NaN keeps its bits
            bits = value.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


# ---- device facts


@functools.cache
def _architecture_of(device: torch.device) -> str:
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    # consumer parts (sm_86, sm_89, sm_120) have 99 KB of shared memory a block: every sm_80 tile fits in that
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def architecture(tensor: torch.Tensor) -> str:
    """Key of the tile table for the device that holds `tensor`."""
    return INTERPRETER if is_interpreted() else _architecture_of(tensor.device)


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Context to launch under: without it Triton launches on the current device, not on the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def compute_type(tensor: torch.Tensor) -> str:
    """One of COMPUTE_TYPES: how dots of this tensor are computed. tf32 only where the user allows it as torch does."""
    if tensor.dtype != torch.float32:
        return {torch.float16: "fp16", torch.bfloat16: "bf16"}[tensor.dtype]
    # fp32_precision, not allow_tf32: reading the latter raises once the newer setting was used
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed and architecture(tensor).startswith("sm_") else "fp32"


def dot_precision(compute: str) -> str:
    """`input_precision` of every dot of a compute type; half types ignore it."""
    return "tf32" if compute == "tf32" else "ieee"


def element_type(compute: str) -> str:
    """Triton's name for the elements in memory."""
    return "fp32" if compute == "tf32" else compute


def is_aligned(*matrices: torch.Tensor) -> bool:
    """True if Triton can read every matrix 16 bytes at a time; it looks for multiples of 16 elements."""
    return all(_rows_aligned(t, 1) or _rows_aligned(t, 0) for t in matrices)


def _rows_aligned(t: torch.Tensor, inner: int) -> bool:
    steps, size = t.stride(), t.shape[inner]
    return steps[inner] == 1 and steps[1 - inner] % 16 == 0 and size % 16 == 0 and t.data_ptr() % 16 == 0


# ---- tile configs


@dataclass(frozen=True)
class TileConfig:
    """Tile of one kernel.

    gemm: [block_m, block_n] of y per program, block_k of K a step. project: [block_m, all ranks], block_k a step.
    grad: [block_n columns, all ranks] per program, block_m rows a step.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    tuned_on: str = UNTUNED

    @property
    def launch(self) -> dict[str, int | bool]:
        """Launch options; fp fusion is named because its default differs between Triton versions."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


# Size classes, gemm: large to small, and ragged; project and grad: narrow (R <= 64), wide, and ragged. Ragged serves
# operands that are not aligned: element-wise loads hold two registers an address, so the tile has to be small.
_RAGGED_HALF = {
    "gemm": {"ragged": TileConfig(64, 64, 32, 4, 2)},
    "project": {"ragged": TileConfig(32, 0, 32, 8, 2)},
    "grad": {"ragged": TileConfig(32, 32, 0, 8, 2)},
}
_RAGGED_SINGLE = {
    "gemm": {"ragged": TileConfig(32, 32, 16, 4, 3)},
    "project": {"ragged": TileConfig(16, 0, 16, 8, 2)},
    "grad": {"ragged": TileConfig(16, 16, 0, 8, 2)},
}
_SM80 = {
    "gemm": {"large": TileConfig(128, 128, 32, 8, 4), "small": TileConfig(64, 64, 64, 4, 3)},
    "project": {"narrow": TileConfig(64, 0, 64, 4, 3), "wide": TileConfig(64, 0, 32, 8, 3)},
    "grad": {"narrow": TileConfig(64, 64, 0, 4, 3), "wide": TileConfig(32, 64, 0, 8, 3)},
}
_SM90 = {
    "gemm": {
        "large": TileConfig(128, 256, 64, 8, 3),
        "medium": TileConfig(128, 128, 64, 8, 4),
        "small": TileConfig(64, 64, 64, 4, 4),
    },
    "project": {"narrow": TileConfig(64, 0, 64, 4, 4), "wide": TileConfig(64, 0, 64, 8, 3)},
    "grad": {"narrow": TileConfig(64, 64, 0, 4, 4), "wide": TileConfig(64, 64, 0, 8, 3)},
}
_GFX942 = {
    "gemm": {"large": TileConfig(128, 128, 32, 8, 2), "small": TileConfig(64, 64, 32, 4, 2)},
    "project": {"narrow": TileConfig(64, 0, 64, 4, 2), "wide": TileConfig(64, 0, 32, 8, 2)},
    "grad": {"narrow": TileConfig(64, 64, 0, 4, 2), "wide": TileConfig(32, 64, 0, 8, 2)},
}
_HALF = {"sm_80": _SM80, "sm_90": _SM90, "sm_100": _SM90, "gfx942": _GFX942}
# a dot of float32 is plain FMAs: short steps keep its operands in registers
_FP32 = {
    "gemm": {"large": TileConfig(64, 64, 16, 4, 3), "small": TileConfig(32, 32, 16, 4, 3)},
    "project": {"narrow": TileConfig(32, 0, 16, 4, 3), "wide": TileConfig(32, 0, 16, 8, 3)},
    "grad": {"narrow": TileConfig(16, 32, 0, 4, 3), "wide": TileConfig(16, 16, 0, 8, 3)},
}
_TF32 = {
    "gemm": {"large": TileConfig(128, 128, 32, 8, 3), "small": TileConfig(64, 64, 32, 8, 3)},
    "project": {"narrow": TileConfig(64, 0, 32, 4, 3), "wide": TileConfig(64, 0, 16, 8, 3)},
    "grad": {"narrow": TileConfig(32, 64, 0, 4, 3), "wide": TileConfig(16, 64, 0, 8, 3)},
}
_INTERPRETED = {
    "gemm": {"ragged": TileConfig(32, 32, 32, 1, 1, group_m=2, tuned_on=SMALL)},
    "project": {"ragged": TileConfig(32, 0, 32, 1, 1, tuned_on=SMALL)},
    "grad": {"ragged": TileConfig(32, 32, 0, 1, 1, tuned_on=SMALL)},
}


def tile_configs(kernel: str, compute: str, arch: str) -> dict[str, TileConfig]:
    """All shipped configs of a kernel ("gemm", "project", "grad") by size class; the only place they come from."""
    if arch == INTERPRETER:
        return _INTERPRETED[kernel]
    if compute in ("fp32", "tf32"):
        return (_FP32 if compute == "fp32" else _TF32)[kernel] | _RAGGED_SINGLE[kernel]
    return _HALF[arch][kernel] | _RAGGED_HALF[kernel]


def pick_gemm_tile(x: torch.Tensor, weight: torch.Tensor) -> TileConfig:
    """For x @ weight.T: the largest tile that still gives 128 programs, about one per multiprocessor, else "small"."""
    tiles = tile_configs("gemm", compute_type(x), architecture(x))
    m, n = x.shape[0], weight.shape[0]
    # M is not specialized on, so x must run along K
    if "small" not in tiles or not (_rows_aligned(x, 1) and is_aligned(weight) and n % 16 == 0):
        return tiles["ragged"]
    for size in ("large", "medium"):
        tile = tiles.get(size)
        if tile and triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n) >= 128:
            return tile
    return tiles["small"]


def pick_rank_tile(kernel: str, r: int, *rows: torch.Tensor) -> TileConfig:
    """For the kernels that hold all ranks at once ("project", "grad") and read `rows`, each [M, K] or [M, N]."""
    tiles = tile_configs(kernel, compute_type(rows[0]), architecture(rows[0]))
    size = "narrow" if r <= 64 else "wide" if r % 16 == 0 else "ragged"
    return tiles[size] if size in tiles and all(_rows_aligned(t, 1) for t in rows) else tiles["ragged"]


def rank_block(r: int) -> int:
    """Ranks of a kernel that holds all at once: the power of two that holds `r`, at least 16, the least a dot takes."""
    return max(triton.next_power_of_2(r), 16)


def rank_step(r: int, *tensors: torch.Tensor) -> int:
    """Ranks per step of the GEMM's rank product: 16 where more would spill (float32, element-wise loads)."""
    return min(rank_block(r), 64 if tensors[0].dtype != torch.float32 and is_aligned(*tensors) else 16)


# ---- ahead-of-time compiles


@dataclass(frozen=True)
class CompileCase:
    """One ahead-of-time compile: what a launcher would pass. `odd` names the arguments that 16 does not divide."""

    kernel: triton.runtime.KernelInterface
    label: str
    compute: str
    rank: int
    pointers: dict[str, str]
    constexprs: dict[str, int | bool | str]
    tile: TileConfig
    odd: tuple[str, ...] = ()


# what an R that 16 does not divide makes odd: R itself and the strides of contiguous [N, R] adapters
ODD_RANK = ("R", "stride_un", "stride_dk", "stride_bn")


def rank_cases(size: str, kernel: triton.runtime.KernelInterface) -> tuple[tuple[int, tuple[str, ...]], ...]:
    """(rank block, odd arguments) to compile for a size class of "project" and "grad"."""
    odd = tuple(kernel.arg_names)
    cases = {"narrow": ((16, ()), (64, ()), (64, ODD_RANK)), "wide": ((128, ()), (256, ()))}
    return cases.get(size, ((64, odd), (256, odd)))
