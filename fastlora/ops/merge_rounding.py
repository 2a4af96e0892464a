"""What csrc/merge_rounding.h computes, over tensors: stochastic rounding of a sum, and residuals of a rounded one."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
# (bits of the significand behind the leading one, smallest exponent that is looked at): a subnormal has the ulp of the
# smallest normal number, and the floors of the wide formats keep 1 / ulp a float32
_FORMATS = {torch.float32: (23, -103), torch.float16: (10, -14), torch.bfloat16: (7, -113)}


def draws(seed: int, module: int, rows: slice, columns: int, by_rows: bool) -> Tensor:
    """32 random bits for each element of rows of a weight, int64: Philox4x32-10 keyed by `seed`.

    The counter is (row, column // 4, module, 0) in the weight's storage, the word column % 4; by_rows is False for
    transposed storage, where rows and columns change places.
    """
    row = torch.arange(rows.start, rows.stop)[:, None].expand(-1, columns)
    col = torch.arange(columns)[None].expand(rows.stop - rows.start, -1)
    row, col = (row, col) if by_rows else (col, row)
    words = _philox([row, col // 4, torch.full_like(row, module), torch.zeros_like(row)], seed)
    return torch.stack(words).gather(0, (col % 4)[None])[0]


def _philox(word: list[Tensor], key: int) -> list[Tensor]:
    """Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; words as int64 in [0, 2^32)."""
    key0, key1 = key & _WORD, key >> 32
    for _ in range(10):
        (high0, low0), (high1, low1) = _product(0xD2511F53, word[0]), _product(0xCD9E8D57, word[2])
        word = [high1 ^ word[1] ^ key0, low1, high0 ^ word[3] ^ key1, low0]
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return word


def _product(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low half of a product of 32-bit words; in two parts, since int64 holds 63 bits."""
    upper = factor * (word >> 16)
    lower = factor * (word & 0xFFFF) + ((upper & 0xFFFF) << 16)
    return (upper >> 16) + (lower >> 32), lower & _WORD


def round_randomly(total: Tensor, dtype: torch.dtype, draw: Tensor) -> Tensor:
    """float32 sums in `dtype` (float16, bfloat16): the neighbour away from zero where the draw is below the rest."""
    draw = draw.to(total.device)
    bits = total.view(torch.int32).to(torch.int64) & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        size = (bits + (draw >> 16)) >> 16
    else:
        small = bits.to(torch.int32).view(torch.float32) * 2.0**24
        whole = small.floor()
        up = (draw >> 8).to(torch.float32) < (small - whole) * 2.0**24
        size = torch.where(bits < 0x38800000, whole.long() + up, (bits - 0x38000000 + (draw >> 19)) >> 13)
        size = torch.where(bits >= 0x47800000, 0x7C00, size)
    rounded = size.to(torch.int16).view(dtype)
    return torch.where(total.isnan(), float("nan"), torch.where(torch.signbit(total), -rounded, rounded))


def residual_value(kept: Tensor, weight: Tensor, work: torch.dtype) -> Tensor:
    """What a residual stands for, in the working precision."""
    return kept.to(work) * _ulp(weight) / 254 if kept.dtype == torch.int8 else kept.to(work)


def residual_store(rest: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The residual that stands nearest to `rest` beside the stored weight."""
    rest = rest.nan_to_num(nan=0.0, posinf=float("inf"), neginf=-float("inf"))
    if dtype != torch.int8:
        return rest.to(dtype)
    return (rest / _ulp(weight) * 254).round().clamp(-127, 127).to(torch.int8)


def _ulp(weight: Tensor) -> Tensor:
    """Spacing of weight's dtype around its values, float32."""
    digits, smallest = _FORMATS[weight.dtype]
    exponent = torch.frexp(weight.float()).exponent - 1
    return torch.ldexp(torch.ones_like(weight, dtype=torch.float32), exponent.clamp(smallest, 127) - digits)
