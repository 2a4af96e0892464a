"""What both kernel test files use."""

from __future__ import annotations

import mmap

import pytest
import torch
from helpers import relative_error


@pytest.fixture
def check():
    """Fail where an error against float64 is over twice that of the same formula in PyTorch in the same dtype.

    The floor is an eighth of the dtype's epsilon, plus 4 float32 roundings for sums in another order; of less than 16
    elements, half an epsilon: one rounding of s, that no other elements average out.
    """

    def compare(ours: dict, plain: dict, truth: dict) -> None:
        dtype = plain["y"].dtype
        for name, exact in truth.items():
            floor = torch.finfo(dtype).eps / (8 if exact.numel() >= 16 else 2) + 4 * torch.finfo(torch.float32).eps
            limit = 2 * relative_error(plain[name], exact) + floor
            error = relative_error(ours[name], exact)
            assert error <= limit, f"{name}: error {error:.3g} is over the limit {limit:.3g}"

    return compare


@pytest.fixture
def spread():
    """Copy of a matrix with the strides asked for, in memory that the system only backs where it is touched."""

    def copy(t: torch.Tensor, strides: tuple[int, int]) -> torch.Tensor:
        elements = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, strides))
        assert elements > 2**31
        memory = mmap.mmap(-1, elements * t.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(memory, dtype=t.dtype).as_strided(t.shape, strides).copy_(t)

    return copy
