"""rank_lora_packed: three adapted projections in one product, against three calls of the definition."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_as_exact_as_torch

from fastlora import reference
from fastlora.ops import rank_lora_linear, rank_lora_packed

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
VARIANTS = ["library", "merged", "split", "one_pass", "leader", "triton"]
D, K = 20, 24


def make(ranks, dtype=torch.float32, adapter_dtype=None, shape=(2, 9), bias=True):
    adapter_dtype = adapter_dtype or dtype
    x, weight = torch.randn(*shape, K).to(dtype), (torch.randn(3 * D, K) / K**0.5).to(dtype)

    def of_each(make_one):
        return [None if r is None else make_one(r) for r in ranks]

    lora_as = of_each(lambda r: (torch.randn(r, K) / K**0.5).to(adapter_dtype))
    lora_bs = of_each(lambda r: (torch.randn(D, r) / max(r, 1) ** 0.5).to(adapter_dtype))
    gates = of_each(torch.randn)
    return x, weight, torch.randn(3 * D).to(dtype) if bias else None, lora_as, lora_bs, gates


def separately(x, weight, bias, lora_as, lora_bs, gates, kappas, scaling):
    """The definition: one call a projection."""
    outputs = []
    for part in range(3):
        w, b = weight[part * D : (part + 1) * D], None if bias is None else bias[part * D : (part + 1) * D]
        if gates[part] is None:
            outputs.append(torch.nn.functional.linear(x, w, b))
        else:
            adapter = (lora_as[part], lora_bs[part], gates[part])
            outputs.append(reference.rank_lora_linear(x, w, b, *adapter, kappas[part], scaling))
    return torch.cat(outputs, -1)


def results(op, x, weight, bias, lora_as, lora_bs, gates, kappas, scaling, dtype, **options):
    """y and every gradient by name, computed in `dtype` (None: as given)."""

    def leaf(t):
        return None if t is None else (t.double() if dtype == torch.float64 else t).clone().requires_grad_(True)

    x, lora_as, lora_bs, gates = leaf(x), [*map(leaf, lora_as)], [*map(leaf, lora_bs)], [*map(leaf, gates)]
    weight, bias = (t if t is None or dtype != torch.float64 else t.double() for t in (weight, bias))
    y = op(x, weight, bias, lora_as, lora_bs, gates, kappas, scaling, **options)
    torch.manual_seed(1)
    leaves = {"dx": x}
    for part in range(3):
        if gates[part] is not None:
            leaves |= {f"da{part}": lora_as[part], f"db{part}": lora_bs[part], f"dg{part}": gates[part]}
    dy = torch.randn(y.shape).to(x.dtype)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach()} | dict(zip(leaves, gradients))


def compare(variant, operands, dtype, kappas=(0.2, 0.0, 0.4), scaling=0.5):
    ours = results(rank_lora_packed, *operands, kappas, scaling, None, backend=variant)
    plain = results(separately, *operands, kappas, scaling, None)
    truth = results(separately, *operands, kappas, scaling, torch.float64)
    assert {name: t.dtype for name, t in ours.items()} == {name: t.dtype for name, t in plain.items()}
    assert_as_exact_as_torch(ours, plain, truth, dtype)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_with_its_own_rank_and_threshold(variant, dtype):
    compare(variant, make((3, 5, 4), dtype), dtype)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ranks", [(3, None, 5), (None, None, 2), (0, 4, 0), (16, 16, 16), (1, 33, 2)])
def test_a_subset_and_other_ranks(variant, ranks):
    compare(variant, make(ranks, shape=(40,), bias=ranks[0] != 0), torch.float32, (0.1, 0.1, 0.1))


@pytest.mark.parametrize("variant", ["split_tma", "one_pass_tma", "leader_tma"])
def test_by_descriptors(variant):
    compare(variant, make((3, 5, 4), torch.float16, shape=(40,)), torch.float16)


@pytest.mark.parametrize("variant", ["library", "split"])
def test_float32_adapters_beside_half_precision(variant):
    compare(variant, make((3, 5, 4), torch.float16, torch.float32), torch.float16)


@pytest.mark.parametrize("kappas", [(torch.tensor(0.3),) * 3, (torch.tensor(0.3), 0.0, torch.tensor(0.1))])
def test_thresholds_on_the_device(kappas):
    operands = make((3, 5, 4))
    ours = rank_lora_packed(*operands, kappas, 0.5)
    torch.testing.assert_close(ours, rank_lora_packed(*operands, [float(k) for k in kappas], 0.5))


@pytest.mark.parametrize("variant", ["library", "split"])
def test_no_rows_and_no_adapter(variant):
    x, weight, bias, *lists = make((3, 5, 4))
    assert rank_lora_packed(x[:0], weight, bias, *lists, (0.0,) * 3, backend=variant).shape == (0, 9, 3 * D)
    plain = rank_lora_packed(x, weight, bias, [None] * 3, [None] * 3, [None] * 3, (0.0,) * 3, backend=variant)
    assert torch.equal(plain, torch.nn.functional.linear(x, weight, bias))


def test_autocast_and_recompute():
    operands = make((3, 5, 4))
    kappas = (0.2, 0.2, 0.2)
    exact = results(rank_lora_packed, *operands, kappas, 0.5, None)
    again = results(rank_lora_packed, *operands, kappas, 0.5, None, recompute=True)
    assert all(torch.equal(exact[name], again[name]) for name in exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = results(rank_lora_packed, *operands, kappas, 0.5, None)
    assert low["y"].dtype == torch.bfloat16 and low["da0"].dtype == torch.float32
    torch.testing.assert_close(low["da0"], exact["da0"], atol=0.5, rtol=0.1)


def test_agrees_with_three_calls_of_the_op():
    x, weight, bias, lora_as, lora_bs, gates = make((3, 5, 4))
    packed = rank_lora_packed(x, weight, bias, lora_as, lora_bs, gates, (0.2,) * 3)
    for part in range(3):
        rows = slice(part * D, (part + 1) * D)
        alone = rank_lora_linear(x, weight[rows], bias[rows], lora_as[part], lora_bs[part], gates[part], 0.2)
        torch.testing.assert_close(packed[..., rows], alone)


def bad(**changes):
    names = ("x", "weight", "bias", "lora_as", "lora_bs", "gates")
    operands = dict(zip(names, make((3, 5, 4))))
    for name, value in changes.items():
        if isinstance(value, tuple):
            part, tensor = value
            operands[name] = [*operands[name]]
            operands[name][part] = tensor
        else:
            operands[name] = value
    return operands


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight": torch.randn(61, K)}, ValueError, r"weight has shape \[61, 24\]; it must be \[3 d, K\]"),
        ({"x": torch.randn(4, 7)}, ValueError, r"x has shape \[4, 7\]; with weight \[60, 24\] it must be"),
        ({"bias": torch.randn(20)}, ValueError, r"bias has shape \[20\].*must be \[60\] or None"),
        ({"lora_as": (1, torch.randn(4, K))}, ValueError, r"lora_as\[1\] has shape \[4, 24\].*must be \[r, 24\]"),
        ({"lora_bs": (2, torch.randn(3 * D, 4))}, ValueError, r"lora_bs\[2\] has shape \[60, 4\].*must be \[20, r\]"),
        ({"gates": (0, torch.randn(18, 3))}, ValueError, r"gates?\[?0?\]?.*shape|lora_as\[0\] has shape"),
        ({"gates": (0, None)}, ValueError, r"gates\[0\] is None beside tensors"),
        ({"gates": [torch.ones(3)]}, ValueError, r"gates has 1 entries; it must have three"),
        ({"lora_as": (0, torch.randn(3, K).half())}, TypeError, r"lora_as\[0\] has dtype torch.float16"),
        ({"gates": (0, [1.0] * 3)}, TypeError, r"gates\[0\] is a list; it must be a torch.Tensor"),
        ({"gates": (0, torch.ones(3, device="meta"))}, ValueError, r"gates\[0\] is on meta and x is on cpu"),
    ],
)
def test_bad_operands_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        rank_lora_packed(**bad(**changes), kappas=(0.0,) * 3)


def test_a_variant_that_cannot_hold_the_ranks_is_refused():
    operands = make((70, 3, 3))
    with pytest.raises(RuntimeError, match="up to 64, and this one has 70"):
        rank_lora_packed(*operands, (0.0,) * 3, backend="one_pass")
    operands = make((100, 100, 100))
    with pytest.raises(RuntimeError, match="ranks up to 256, and this one is 300"):
        rank_lora_packed(*operands, (0.0,) * 3, backend="triton")
