"""What every kernel file shares: small jit helpers and facts of tensors and devices."""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
import triton.language as tl

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
    # GROUP_M row tiles share each column tile while it is in L2; a row's column tiles come in increasing order
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


def multiprocessors(tensor: torch.Tensor) -> int:
    """Programs that are resident at once whatever a kernel uses: one a multiprocessor; one in the interpreter."""
    return 1 if is_interpreted() else _multiprocessors_of(tensor.device)


@functools.cache
def _multiprocessors_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
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
    return all(rows_aligned(t, 1) or rows_aligned(t, 0) for t in matrices)


def rows_aligned(t: torch.Tensor, inner: int) -> bool:
    steps, size = t.stride(), t.shape[inner]
    return steps[inner] == 1 and steps[1 - inner] % 16 == 0 and size % 16 == 0 and t.data_ptr() % 16 == 0
