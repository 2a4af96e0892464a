"""merge_, unmerge_ and new_residuals on drawn lists of modules."""

from __future__ import annotations

import torch
from drawn import LAYOUTS, laid_out
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlora.ops import merge_, new_residuals, unmerge_

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
WEIGHTS = ("contiguous", "transposed", "every other row", "shifted")  # what a weight may be: one stride is 1
MODULES = st.lists(
    st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(0, 6), st.sampled_from(DTYPES),
              st.sampled_from(WEIGHTS), st.sampled_from(LAYOUTS)),
    max_size=4,
)  # fmt: skip
SEEDS = st.integers(0, 2**31)


def make(seed, modules):
    """weights, lora_as, lora_bs, gates and scalings."""
    generator, columns = torch.Generator().manual_seed(seed), []
    for n, k, r, dtype, layout, adapter_layout in modules:
        weight, a, b = (torch.randn(*shape, generator=generator) for shape in ((n, k), (r, k), (n, r)))
        gate = torch.randn(r, generator=generator)
        gate[::3] = 0.0
        columns.append([laid_out(weight.to(dtype), layout), *(laid_out(t, adapter_layout) for t in (a, b, gate)), 0.7])
    return [list(column) for column in zip(*columns)] or [[], [], [], [], []]


def bits(tensors):
    return [tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"" for tensor in tensors]


@settings(max_examples=40)
@given(SEEDS, MODULES, st.booleans())
def test_many_modules_are_merged_as_each_alone(seed, modules, with_residuals):
    weights, *adapters, scaling = make(seed, modules)
    residuals = new_residuals(weights) if with_residuals else None
    alone, alone_residuals = [w.clone() for w in weights], new_residuals(weights)
    report = merge_(weights, *adapters, scaling=scaling, residuals=residuals)
    for i, weight in enumerate(alone):
        given_residual = [alone_residuals[i]] if with_residuals else None
        one = merge_([weight], *([column[i]] for column in adapters), scaling=[0.7], residuals=given_residual)
        assert one.modules[0].kept_rank == report.modules[i].kept_rank == int(adapters[2][i].count_nonzero())
    assert bits(weights) == bits(alone)
    assert not with_residuals or bits(residuals) == bits(alone_residuals)


@settings(max_examples=40)
@given(SEEDS, MODULES)
def test_a_merge_with_residuals_is_undone(seed, modules):
    """Near the weight that was there; to its very bits where the update is no larger than it."""
    weights, *adapters, scaling = make(seed, modules)
    before, residuals = [w.clone() for w in weights], new_residuals(weights)
    merge_(weights, *adapters, scaling=scaling, residuals=residuals)
    unmerge_(weights, *adapters, scaling=scaling, residuals=residuals)
    for weight, old, (*_, dtype, _, _) in zip(weights, before, modules):
        assert torch.allclose(weight.double(), old.double(), rtol=torch.finfo(dtype).eps, atol=1e-5)


@settings(max_examples=20)
@given(SEEDS, MODULES, st.sampled_from(["gates", "ranks", "b"]))
def test_an_update_of_nothing_leaves_every_bit(seed, modules, how):
    weights, a, b, gates, scaling = make(seed, modules)
    before = bits(weights)
    if how == "gates":
        gates = [torch.zeros(len(gate)) for gate in gates]
    elif how == "b":
        b = [torch.zeros(each.shape) for each in b]
    else:
        a, b, gates = [each[:0] for each in a], [each[:, :0] for each in b], [each[:0] for each in gates]
    report = merge_(weights, a, b, gates, scaling=scaling)
    assert bits(weights) == before and all(module.delta_norm == 0 for module in report)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.sampled_from(DTYPES)), max_size=4), st.booleans())
def test_new_residuals(shapes, int8):
    weights = [torch.randn(n, k).to(dtype) for n, k, dtype in shapes]
    for weight, residual in zip(weights, new_residuals(weights, int8=int8)):
        assert residual.shape == weight.shape and not residual.any()
        assert residual.dtype == (torch.int8 if int8 else weight.dtype)
