"""csrc/merge_rounding.h in every instruction set: the same bits, random words by the published generator, exact residuals."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_calls import DTYPES, raw

from fastlora.build import build_info, extension
from fastlora.ops.merge_rounding import draws

_C = extension()
pytestmark = pytest.mark.skipif(_C is None, reason=f"no extension: {build_info()['extension_reason']}")

LEVELS = _C.simd_levels() if _C else []
MODES = ("stochastic", "int8", "same dtype")


def matrix(tensor):
    dtype = getattr(_C.DType, str(tensor.dtype).removeprefix("torch."))
    return _C.Matrix(tensor.data_ptr(), dtype, *tensor.shape, *tensor.stride())


def run(weight, lora_a, lora_b, gate, mode, level="auto", threads=1, merges=1, seed=9):
    """Merged copy, residual or None, and the report's fields after the last merge."""
    weight = weight.clone(memory_format=torch.preserve_format)
    residual = None
    if mode in ("int8", "same dtype"):
        residual = torch.zeros_like(weight, dtype=torch.int8 if mode == "int8" else weight.dtype)
    options = {
        "residual": None if residual is None else matrix(residual),
        "seed": seed if mode == "stochastic" else None,
        "module": 3,
    }
    item = _C.MergeItem(matrix(weight), matrix(lora_a), matrix(lora_b), gate.data_ptr(), 0.7, **options)
    for _ in range(merges):
        (report,) = _C.merge_cpu([item], threads, level)
    fields = [name for name in dir(report) if not name.startswith("_")]
    return weight, residual, {field: getattr(report, field) for field in fields}


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(0, 9)),
    name=st.sampled_from(DTYPES),
    mode=st.sampled_from(MODES),
    transposed=st.booleans(),
    seed=st.integers(0, 2**31),
    broken=st.booleans(),
)
def test_every_level_and_thread_count_gives_the_same_bits(shape, name, mode, transposed, seed, broken):
    """Weights, residuals and reports; from 1e-8 to overflow, with and without non-finite values."""
    n, k, r = shape
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(n, k, generator=generator) * 10).to(getattr(torch, name))
    weight = weight.t().contiguous().t() if transposed else weight
    lora_a, lora_b = torch.randn(r, k, generator=generator), torch.randn(n, r, generator=generator)
    gate = torch.randn(r, generator=generator) * 10 ** torch.empty(r).uniform_(-8, 4, generator=generator)
    if broken and r:
        lora_b[0, 0], lora_a[0, -1] = float("nan"), float("inf")
    results = [run(weight, lora_a, lora_b, gate, mode, level, merges=2) for level in LEVELS]
    results.append(run(weight, lora_a, lora_b, gate, mode, "auto", threads=3, merges=2))
    first = results[0]
    for out, residual, report in results[1:]:
        assert raw(out) == raw(first[0]) and raw(residual) == raw(first[1])
        assert str(report) == str(first[2])  # as text, where a NaN equals itself


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("transposed", [False, True])
def test_draws_are_those_of_the_published_generator(level, transposed):
    """bfloat16 goes up where the upper 16 bits of the draw reach what the dropped part leaves free."""
    n, k, step = 37, 45, 2.0**-7
    weight = torch.ones(n, k, dtype=torch.bfloat16)
    weight = weight.t().contiguous().t() if transposed else weight
    lora_a, lora_b = torch.rand(1, k), torch.ones(n, 1)
    out, _, _ = run(weight, lora_a, lora_b, torch.full((1,), step / 0.7), "stochastic", level, seed=2**63 - 5)
    word = draws(2**63 - 5, 3, slice(0, n), k, by_rows=not transposed) >> 16
    c = (lora_b * torch.tensor(0.7 * float(torch.tensor(step / 0.7)))) * lora_a
    dropped = (1.0 + c).view(torch.int32) & 0xFFFF
    assert torch.equal(out > 1, dropped + word >= 1 << 16)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("name", "digits"), [("float32", 23), ("float16", 10), ("bfloat16", 7)])
def test_int8_residual_is_the_rest_in_254ths_of_an_ulp(name, digits, level):
    """Weights of every exponent that a model has; the update is one product, exact in float32."""
    exponents = torch.arange(-14, 12)
    weight = torch.ldexp(torch.ones(len(exponents), 33), exponents[:, None]).to(getattr(torch, name))
    lora_b = torch.ldexp(torch.ones(len(exponents), 1), exponents[:, None] - digits)
    lora_a = torch.linspace(-0.49, 3.49, 33)[None].to(torch.bfloat16).float()
    out, residual, _ = run(weight, lora_a, lora_b, torch.full((1,), 1 / 0.7).double().float(), "int8", level)
    sg = torch.tensor(0.7 * float(torch.full((1,), 1 / 0.7)))
    for row, exponent in enumerate(exponents.tolist()):
        for col in range(33):
            delta = Fraction(float(lora_b[row, 0] * sg)) * Fraction(float(lora_a[0, col]))
            rest = Fraction(float(weight[row, col])) + delta - Fraction(float(out[row, col]))
            stored = Fraction(float(out[row, col]))
            ulp = Fraction(2) ** (exponent + (stored >= Fraction(2) ** (exponent + 1)) - digits)
            ulp = ulp if stored >= Fraction(2) ** exponent else ulp / 2
            assert abs(Fraction(int(residual[row, col])) - rest / ulp * 254) <= Fraction(1, 2) + Fraction(1, 100)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", ["int8", "same dtype"])
def test_residuals_stop_at_infinity_and_nothing_else_is_touched(mode, level):
    weight = torch.full((5, 18), 65504.0, dtype=torch.float16)
    lora_a, lora_b = torch.zeros(1, 18), torch.ones(5, 1)
    lora_a[0, 3], lora_a[0, 17] = 64.0, float("nan")
    out, residual, report = run(weight, lora_a, lora_b, torch.ones(1), mode, level)
    assert (out[:, 3] == float("inf")).all() and out[:, 17].isnan().all() and report["not_finite"] == 10
    assert (residual[:, 17] == 0).all()
    untouched = [col for col in range(18) if col not in (3, 17)]
    assert (out[:, untouched] == 65504).all() and (residual[:, untouched] == 0).all()


def test_raw_interface_refuses_residuals_that_do_not_fit():
    weight, a, b = torch.zeros(4, 8, dtype=torch.float16), torch.zeros(2, 8), torch.zeros(4, 2)
    for residual, match in (
        (torch.zeros(8, 4, dtype=torch.float16), "they must have one shape"),
        (torch.zeros(4, 8), "weight's dtype or int8"),
        (torch.zeros(8, 4, dtype=torch.int8).t(), "unit stride must be where"),
    ):
        with pytest.raises(ValueError, match=match):
            _C.MergeItem(matrix(weight), matrix(a), matrix(b), weight.data_ptr(), 1.0, residual=matrix(residual))
    with pytest.raises(ValueError, match="weight is int8"):
        _C.MergeItem(matrix(weight.to(torch.int8)), matrix(a), matrix(b), weight.data_ptr(), 1.0)
