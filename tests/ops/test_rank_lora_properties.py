"""rank_lora_linear and rank_lora_packed on drawn shapes, dtypes, ranks, thresholds and strides."""

from __future__ import annotations

import pytest
import torch
from drawn import LAYOUTS, laid_out
from helpers import Operands, assert_as_exact_as_torch, make_operands, outputs_and_gradients, reference_in
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlora.ops import rank_lora_linear, rank_lora_packed

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = st.lists(st.integers(0, 5), max_size=3)
SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 20))
KAPPAS = st.sampled_from([0.0, 0.1, 0.5, 3.0])
SEEDS = st.integers(0, 2**31)


def case(seed, shape, sizes, dtype, layouts, kappa):
    """Operands of these strides, of which some gates lie exactly at the threshold and at 0."""
    torch.manual_seed(seed)
    operands = make_operands(shape or (1,), *sizes, dtype, bias=bool(seed % 2))
    operands.gate[::3], operands.gate[1::3] = kappa, -kappa
    tensors = [t if t is None else laid_out(t, layout) for t, layout in zip(operands.tensors(), layouts)]
    return Operands(*tensors), torch.randn(*(shape or (1,)), sizes[1]).to(dtype)


def contiguous(operands):
    return Operands(*(t if t is None else t.contiguous() for t in operands.tensors()))


@settings(max_examples=40)
@given(
    SEEDS, SHAPES, SIZES, st.sampled_from(DTYPES), st.lists(st.sampled_from(LAYOUTS), min_size=6, max_size=6), KAPPAS
)
def test_linear(seed, shape, sizes, dtype, layouts, kappa):
    """As exact as PyTorch, output and every gradient, whatever the strides."""
    operands, dy = case(seed, shape, sizes, dtype, layouts, kappa)
    plain, truth = (reference_in(kind, contiguous(operands), dy, kappa, 0.7) for kind in (dtype, torch.float64))
    ours = outputs_and_gradients(rank_lora_linear, operands, dy, kappa, 0.7, backend="torch")
    assert_as_exact_as_torch(ours, plain, truth, dtype)
    for name, value in ours.items():
        assert value.shape == truth[name].shape and value.dtype == plain[name].dtype, name


@pytest.mark.parametrize("backend", ["split", "one_pass"])
@settings(max_examples=6)
@given(
    SEEDS,
    SHAPES,
    SIZES,
    st.sampled_from(DTYPES),
    st.lists(st.sampled_from(LAYOUTS[:-1]), min_size=6, max_size=6),
    KAPPAS,
)
def test_linear_by_the_kernels(backend, seed, shape, sizes, dtype, layouts, kappa):
    operands, dy = case(seed, shape, sizes, dtype, layouts, kappa)
    plain, truth = (reference_in(kind, contiguous(operands), dy, kappa, 0.7) for kind in (dtype, torch.float64))
    ours = outputs_and_gradients(rank_lora_linear, operands, dy, kappa, 0.7, backend=backend)
    assert_as_exact_as_torch(ours, plain, truth, dtype)


@settings(max_examples=20)
@given(SEEDS, st.integers(0, 5), st.integers(1, 20), st.integers(1, 20),
       st.lists(st.none() | st.integers(0, 9), min_size=3, max_size=3), st.lists(KAPPAS, min_size=3, max_size=3))  # fmt: skip
def test_packed_is_three_projections(seed, rows, k, d, ranks, kappas):
    """Also of projections without an adapter, and of rank 0. Float64: what is wrong is wrong by more than a rounding."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, weight, bias = drawn(rows, k), drawn(3 * d, k), drawn(3 * d) if seed % 2 else None
    adapters = [None if r is None else (drawn(r, k), drawn(d, r), drawn(r)) for r in ranks]
    lists = [[None if adapter is None else adapter[i] for adapter in adapters] for i in range(3)]
    expected = []
    for part, adapter in enumerate(adapters):
        mine = slice(part * d, (part + 1) * d)
        given_adapter = adapter or (drawn(0, k), drawn(d, 0), drawn(0))
        b = None if bias is None else bias[mine]
        expected.append(rank_lora_linear(x, weight[mine], b, *given_adapter, kappas[part], 0.7, backend="torch"))
    y = rank_lora_packed(x, weight, bias, *lists, kappas, 0.7, backend="torch")
    assert torch.allclose(y, torch.cat(expected, -1), rtol=1e-12, atol=1e-12)
