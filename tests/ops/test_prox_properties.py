"""soft_threshold on drawn values: what a proximal operator of |v| does, to the last bit."""

from __future__ import annotations

import torch
from drawn import LAYOUTS, laid_out
from hypothesis import given
from hypothesis import strategies as st

from fastlora.ops import soft_threshold
from fastlora.ops.prox import soft_threshold_

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
VALUES = st.lists(st.integers(-40, 40).map(lambda n: n / 16), max_size=40)  # exact in each dtype, often equal to kappa
KAPPAS = st.integers(0, 40).map(lambda n: n / 16)


@given(VALUES, KAPPAS, st.sampled_from(DTYPES), st.sampled_from(LAYOUTS[:-1]))
def test_exact(values, kappa, dtype, layout):
    v = laid_out(torch.tensor(values, dtype=dtype), layout)
    shrunk = soft_threshold(v, kappa)
    assert shrunk.tolist() == [max(abs(x) - kappa, 0.0) * (1 if x > 0 else -1) + 0.0 for x in values]
    assert (shrunk.shape, shrunk.dtype) == (v.shape, dtype)
    assert torch.equal(soft_threshold(-v, kappa), -shrunk)  # odd
    twice = soft_threshold(shrunk, kappa)
    assert torch.equal(twice, soft_threshold(v, 2 * kappa))  # a semigroup: two steps are one of their sum


@given(VALUES, KAPPAS, st.sampled_from(DTYPES))
def test_released(values, kappa, dtype):
    """What the released code computes: every |v| < 2 kappa dies, but for |v| = kappa, which stays as it is."""
    found = soft_threshold(torch.tensor(values, dtype=dtype), kappa, operator="released").tolist()
    for value, released in zip(values, found):
        shrunk = value - kappa if value > 0 else value + kappa
        alive = abs(value) >= 2 * kappa
        assert released == (value if abs(value) == kappa else shrunk if alive and value else 0.0)


@given(VALUES, KAPPAS, st.sampled_from(["exact", "released"]))
def test_derivative(values, kappa, operator):
    v = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    shrunk = soft_threshold(v, kappa, operator=operator)
    (gradient,) = torch.autograd.grad(shrunk.sum(), v)
    assert gradient.tolist() == [
        float(kappa == 0 or alive != 0 or (operator == "released" and abs(value) == 2 * kappa))
        for value, alive in zip(values, shrunk.tolist())
    ]


@given(st.lists(VALUES, max_size=5), KAPPAS, st.sampled_from(["exact", "released"]), st.sampled_from(LAYOUTS[:-1]))
def test_in_place_over_many(lists, kappa, operator, layout):
    gates = [laid_out(torch.tensor(values), layout) for values in lists]
    expected = [soft_threshold(gate, kappa, operator=operator) for gate in gates]
    soft_threshold_(gates, kappa, operator=operator)
    assert all(map(torch.equal, gates, expected))
