"""What both kernel test files use."""

from __future__ import annotations

import mmap
from collections import Counter

import pytest
import torch
from helpers import assert_as_exact_as_torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder


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


@pytest.fixture
def reads(monkeypatch):
    """reads(tensor): how often its elements were loaded, by address, as a set of counts."""
    counts, load = Counter(), InterpreterBuilder.create_masked_load  # descriptors come here too

    def counted(self, ptrs, mask, other, *rest, **options):
        counts.update(ptrs.data[mask.data].tolist())
        return load(self, ptrs, mask, other, *rest, **options)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted)
    return lambda tensor: _of(tensor, counts)


@pytest.fixture
def writes(monkeypatch):
    """writes(tensor): how often its elements were stored."""
    counts, store = Counter(), InterpreterBuilder.create_masked_store

    def counted(self, ptrs, value, mask, *rest):
        counts.update(ptrs.data[mask.data].tolist())
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted)
    return lambda tensor: _of(tensor, counts)


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels launched so far."""
    names, launch = [], GridExecutor.__call__

    def counted(self, *arguments, **options):
        names.append(self.fn.__name__)
        return launch(self, *arguments, **options)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    return names


def _of(tensor, counts):
    first, size = tensor.data_ptr(), tensor.element_size()
    return {counts[first + size * index] for index in range(tensor.numel())}
