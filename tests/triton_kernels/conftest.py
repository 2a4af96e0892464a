"""What both kernel test files use."""

from __future__ import annotations

import mmap

import pytest
import torch
from helpers import assert_as_exact_as_torch


@pytest.fixture
def check():
    """`assert_as_exact_as_torch` in the dtype of y."""
    return lambda ours, plain, truth: assert_as_exact_as_torch(ours, plain, truth, plain["y"].dtype)


@pytest.fixture
def spread():
    """Copy of a matrix with the strides asked for, in memory that the system only backs where it is touched."""

    def copy(t: torch.Tensor, strides: tuple[int, int]) -> torch.Tensor:
        elements = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, strides))
        assert elements > 2**31
        memory = mmap.mmap(-1, elements * t.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(memory, dtype=t.dtype).as_strided(t.shape, strides).copy_(t)

    return copy
