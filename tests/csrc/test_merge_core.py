"""csrc/merge_core.h against a bit-level model of round-to-nearest-even, in every instruction set that runs here.

The model works on integers and fractions and shares nothing with the code under test.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlora.build import build_info, extension

_C = extension()
pytestmark = pytest.mark.skipif(_C is None, reason=f"no extension: {build_info()['extension_reason']}")

LEVELS = _C.simd_levels() if _C else []
# name: (bits of the significand with the leading one, exponent of the smallest normal number, exponent of the largest)
FORMATS = {"float32": (24, -126, 127), "float16": (11, -14, 15), "bfloat16": (8, -126, 127)}
HALVES = ("float16", "bfloat16")
CANONICAL_NAN = {"float32": 0x7FC00000, "float16": 0x7E00, "bfloat16": 0x7FC0}


def storage(name: str) -> type:
    return np.uint32 if name == "float32" else np.uint16


def round_by_library(values: np.ndarray, name: str, level: str) -> np.ndarray:
    source = np.ascontiguousarray(values, dtype=np.float32)
    target = np.full(source.shape, 0x5555, dtype=storage(name))
    _C.round_to(getattr(_C.DType, name), source.ctypes.data, target.ctypes.data, source.size, level)
    return target


def widen_by_library(bits: np.ndarray, name: str, level: str) -> np.ndarray:
    source = np.ascontiguousarray(bits, dtype=storage(name))
    target = np.full(source.shape, 777, dtype=np.float32)
    _C.widen(getattr(_C.DType, name), source.ctypes.data, target.ctypes.data, source.size, level)
    return target


def model_round(values: np.ndarray, name: str) -> np.ndarray:
    """Bits of float32 values rounded to nearest even, by integer arithmetic on their significands."""
    digits, emin, emax = FORMATS[name]
    bits = values.astype(np.float32).view(np.uint32).astype(np.int64)
    sign, exponent, fraction = bits >> 31, (bits >> 23) & 0xFF, bits & 0x7FFFFF
    significand = np.where(exponent > 0, fraction | 0x800000, fraction)
    low = np.maximum(exponent, 1) - 127 - 23  # value = significand * 2^low
    quantum = np.maximum(low + 24 - digits, emin - digits + 1)  # spacing of the target around a value of this exponent
    shift = np.minimum(quantum - low, 40)
    kept, rest, half = significand >> shift, significand & ((1 << shift) - 1), (1 << shift) >> 1
    # rest can only equal `half` with shift >= 1; shift == 0 keeps everything
    kept += (rest > half) | ((rest == half) & (shift > 0) & (kept & 1 == 1))
    # kept in units of 2^quantum; the encodings of subnormals and normals follow one another without a gap
    encoded = kept + (quantum - (emin - digits + 1)) * (1 << (digits - 1))
    infinity = (emax - emin + 2) << (digits - 1)
    encoded = np.minimum(encoded, infinity)
    encoded = np.where((exponent == 255) & (fraction == 0), infinity, encoded) | sign << (15 if name in HALVES else 31)
    return np.where((exponent == 255) & (fraction != 0), CANONICAL_NAN[name], encoded).astype(storage(name))


def exact(bits: np.ndarray, name: str) -> np.ndarray:
    """float64 values of finite 16-bit patterns, by the definition of the format."""
    digits, emin, _ = FORMATS[name]
    size = bits.astype(np.int64) & 0x7FFF
    exponent, fraction = size >> (digits - 1), size & ((1 << (digits - 1)) - 1)
    significand = np.where(exponent > 0, fraction | 1 << (digits - 1), fraction)
    return np.where(bits & 0x8000, -1.0, 1.0) * np.ldexp(significand, np.maximum(exponent, 1) - 1 + emin - (digits - 1))


def all_patterns(name: str) -> tuple[np.ndarray, np.ndarray]:
    """The finite and the other 16-bit patterns."""
    bits, (digits, emin, emax) = np.arange(1 << 16, dtype=np.uint16), FORMATS[name]
    finite = (bits & 0x7FFF) < (emax - emin + 2) << (digits - 1)
    return bits[finite], bits[~finite]


def hard_values(name: str) -> np.ndarray:
    """Every 16-bit number, every tie between neighbours, the float32 numbers on both sides of each, and a sample."""
    finite, _ = all_patterns(name)
    numbers = np.unique(exact(finite, name))
    beyond = 2 * numbers[-1] - numbers[-2]  # the tie with it decides between the largest number and infinity
    with np.errstate(over="ignore"):
        ties = ((numbers + np.append(numbers[1:], beyond)) / 2).astype(np.float32)
    points = np.concatenate([numbers.astype(np.float32), ties, -ties])
    around = [np.nextafter(points, np.float32(side)) for side in (-np.inf, np.inf)]
    sample = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-45, -1e-45, 3.4028235e38], dtype=np.float32)
    signalling = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF], dtype=np.uint32).view(np.float32)
    return np.concatenate([points, *around, sample, special, signalling])


def test_model_agrees_with_numpy_and_torch():
    values = hard_values("float16")
    number = ~np.isnan(values)
    with np.errstate(over="ignore"):
        assert np.array_equal(model_round(values, "float16")[number], values.astype(np.float16).view(np.uint16)[number])
    torch_bits = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    assert np.array_equal(model_round(values, "bfloat16")[number], torch_bits[number])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", HALVES)
class TestConversion:
    def test_widening_is_exact_for_all_patterns(self, name, level):
        finite, others = all_patterns(name)
        wide = widen_by_library(finite, name, level)
        assert np.array_equal(wide.astype(np.float64), exact(finite, name))
        assert np.array_equal(np.signbit(wide), finite >= 0x8000)
        infinite = others & ((1 << (FORMATS[name][0] - 1)) - 1) == 0
        widened = widen_by_library(others, name, level)
        assert np.array_equal(widened[infinite], [np.inf, -np.inf])
        assert np.isnan(widened[~infinite]).all()

    def test_round_trip_of_all_patterns(self, name, level):
        finite, others = all_patterns(name)
        assert np.array_equal(round_by_library(widen_by_library(finite, name, level), name, level), finite)
        back = round_by_library(widen_by_library(others, name, level), name, level)
        infinite = others & ((1 << (FORMATS[name][0] - 1)) - 1) == 0
        assert np.array_equal(back, np.where(infinite, others, CANONICAL_NAN[name]))

    def test_rounds_to_nearest_even(self, name, level):
        values = hard_values(name)
        assert np.array_equal(round_by_library(values, name, level), model_round(values, name))

    @pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 33])
    def test_writes_exactly_count_elements(self, name, level, count):
        values, target = np.linspace(-3, 3, 64, dtype=np.float32), np.full(64, 0x5555, dtype=np.uint16)
        _C.round_to(getattr(_C.DType, name), values.ctypes.data, target.ctypes.data, count, level)
        assert np.array_equal(target[:count], model_round(values[:count], name))
        assert (target[count:] == 0x5555).all()


def test_boundaries_of_float16():
    """The values that a reader would look up, written out."""
    table = {65504.0: 0x7BFF, 65519.996: 0x7BFF, 65520.0: 0x7C00, -65520.0: 0xFC00, 2.0**-24: 1, 2.0**-25: 0}
    table |= {2.0**-25 * 1.0001: 1, 3 * 2.0**-25: 2, 2.0**-14: 0x0400, 2.0**-14 * (1 - 2.0**-11): 0x0400, -0.0: 0x8000}
    table |= {1 + 2.0**-11: 0x3C00, 1 + 3 * 2.0**-11: 0x3C02}
    for level in LEVELS:
        assert round_by_library(np.array(list(table)), "float16", level).tolist() == list(table.values())


# ---- the whole update, in fractions


def to_float32(value: Fraction, name: str = "float32") -> Fraction:
    """A fraction rounded to nearest even to a format; overflow is not modelled."""
    digits, emin, _ = FORMATS[name]
    if value == 0:
        return value
    exponent = 0
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    quantum = Fraction(2) ** (max(exponent, emin) - digits + 1)
    return round(value / quantum) * quantum  # Python rounds halves to even


def update_in_fractions(weight, lora_a, lora_b, gate, scaling, name):
    sg = [to_float32(Fraction(scaling * float(g))) for g in gate]
    out = np.empty(weight.shape)
    for n, k in np.ndindex(*weight.shape):
        delta = Fraction(0)
        for r, g in enumerate(gate):
            if g != 0:
                c = to_float32(Fraction(float(lora_b[n, r])) * sg[r])
                delta = to_float32(c * Fraction(float(lora_a[r, k])) + delta)
        total = to_float32(Fraction(float(weight[n, k])) + delta)
        out[n, k] = float(to_float32(total, name))
    return out


def matrix(tensor: torch.Tensor) -> object:
    dtype = getattr(_C.DType, str(tensor.dtype).removeprefix("torch."))
    return _C.Matrix(tensor.data_ptr(), dtype, *tensor.shape, *tensor.stride())


def merge_by_library(weight, lora_a, lora_b, gate, scaling, level, threads=1):
    """The merged copy of `weight`, and every field of the report."""
    merged = weight.clone(memory_format=torch.preserve_format)
    item = _C.MergeItem(matrix(merged), matrix(lora_a), matrix(lora_b), gate.data_ptr(), scaling)
    (report,) = _C.merge_cpu([item], threads, level)
    fields = [name for name in dir(report) if not name.startswith("_")]
    return merged, {field: getattr(report, field) for field in fields}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", FORMATS)
def test_update_is_the_documented_one_bit_for_bit(name, level):
    dtype = getattr(torch, name)
    weight, lora_a, lora_b = torch.randn(5, 19).to(dtype), torch.randn(6, 19), torch.randn(5, 6).to(torch.bfloat16)
    gate = torch.tensor([0.3, 0.0, -1.7, 2.1, 0.0, 1e-3])
    expected = update_in_fractions(weight.float().numpy(), lora_a, lora_b.float(), gate, 0.37, name)
    merged, report = merge_by_library(weight, lora_a, lora_b, gate, 0.37, level)
    assert np.array_equal(merged.double().numpy(), expected)
    assert report["kept_rank"] == 4


SHAPES = st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(0, 20))


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.sampled_from(list(FORMATS)), st.booleans(), st.integers(0, 2**31), st.booleans())
def test_every_level_gives_the_same_bits(shape, name, transposed, seed, broken):
    """Weights and reports, from 1e-8 to overflow, with and without non-finite values."""
    n, k, r = shape
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(n, k, generator=generator) * 10).to(getattr(torch, name))
    weight = weight.t().contiguous().t() if transposed else weight
    lora_a, lora_b = torch.randn(r, k, generator=generator), torch.randn(n, r, generator=generator)
    gate = torch.randn(r, generator=generator) * 10 ** torch.empty(r).uniform_(-8, 4, generator=generator)
    gate[torch.rand(r, generator=generator) < 0.3] = 0
    if broken and r:
        lora_b[0, 0], lora_a[0, -1] = float("nan"), float("inf")
    assert_same([merge_by_library(weight, lora_a, lora_b, gate, 1.0, level) for level in LEVELS])


@pytest.mark.parametrize("name", FORMATS)
def test_every_thread_count_gives_the_same_bits(name):
    """The same sums too: a report does not depend on which thread took which tile."""
    weight, lora_a, lora_b = torch.randn(333, 301).to(getattr(torch, name)), torch.randn(7, 301), torch.randn(333, 7)
    gate = torch.randn(7)
    assert_same([merge_by_library(weight, lora_a, lora_b, gate, 0.1, "auto", threads) for threads in (1, 2, 3, 11, 64)])


def assert_same(results):
    first, *others = results
    for merged, report in others:
        assert torch.equal(merged.contiguous().view(torch.uint8), first[0].contiguous().view(torch.uint8))
        assert str(report) == str(first[1])  # as text, where a NaN equals itself


@pytest.mark.parametrize("level", LEVELS)
def test_check_finds_what_a_merge_would_overflow(level):
    """One element of a row goes over the limit by one step; its neighbour stays at the limit."""
    weight, lora_a = torch.zeros(40, 33, dtype=torch.float16), torch.zeros(1, 33)
    weight[37], lora_a[0, 32], lora_a[0, 31] = 65504.0, 16.0, 15.996
    lora_b, gate = torch.ones(40, 1), torch.ones(1)  # names of their own: the item holds addresses alone
    item = _C.MergeItem(matrix(weight), matrix(lora_a), matrix(lora_b), gate.data_ptr(), 1.0)
    (report,) = _C.check_cpu([item], 1, level)
    assert (report.not_finite, report.largest) == (1, 65520.0)


def test_subnormals_survive_flush_denormal():
    """The merge sets its own rounding mode, whatever the process has set."""
    weight, lora_a, lora_b = torch.full((4, 40), 2.0**-130), torch.full((1, 40), 2.0**-130), torch.ones(4, 1)
    expected = torch.full((4, 40), 2.0**-129)
    try:
        torch.set_flush_denormal(True)
        merged, _ = merge_by_library(weight, lora_a, lora_b, torch.ones(1), 1.0, "auto")
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(merged, expected)


def test_raw_interface_refuses_what_it_cannot_hold():
    weight = torch.zeros(4, 8)
    with pytest.raises(ValueError, match="address is 0"):
        _C.Matrix(0, _C.DType.float32, 4, 8, 8, 1)
    with pytest.raises(ValueError, match="they must be"):
        _C.MergeItem(matrix(weight), matrix(torch.zeros(2, 7)), matrix(torch.zeros(4, 2)), weight.data_ptr(), 1.0)
    with pytest.raises(ValueError, match="one must be 1"):
        strided = torch.zeros(8, 16)[::2, ::2]
        _C.MergeItem(matrix(strided), matrix(torch.zeros(2, 8)), matrix(torch.zeros(4, 2)), weight.data_ptr(), 1.0)
    with pytest.raises(ValueError, match="not among what this processor runs"):
        _C.merge_cpu([], 1, "mmx")
