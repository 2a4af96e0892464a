"""export_peft and import_peft: a model that was written and read again computes the same, for drawn ranks and gates."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from faults.models import K, ours, two_linears
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlora
from fastlora.interop import export_peft, import_peft

GATES = st.lists(st.integers(-8, 8).map(lambda n: n / 4), min_size=4, max_size=4)


@settings(max_examples=20)
@given(st.tuples(GATES, GATES), st.sampled_from([0.0, 0.5, 1.0]), st.floats(0.125, 4, width=32), st.integers(0, 2**31))
def test_the_same_outputs(gates, kappa, scaling, seed):
    model = ours()
    for (_, adapter), values in zip(fastlora.adapters(model), gates):
        adapter.gate.data.copy_(torch.tensor(values))
        adapter.kappa, adapter.scaling = kappa, scaling
    active = [adapter.active_rank() for _, adapter in fastlora.adapters(model)]
    if not any(active):
        return  # nothing to write, which export_peft says
    with tempfile.TemporaryDirectory() as folder:
        export_peft(model, Path(folder) / "peft")
        again = two_linears()
        assert len(import_peft(again, Path(folder) / "peft")) == sum(rank > 0 for rank in active)
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(again(x), model(x), rtol=1e-5, atol=1e-5)
