"""Journals of drawn tasks: the weights after every task come back bit for bit."""

from __future__ import annotations

import tempfile

import torch
from drawn import names
from hypothesis import given, settings
from hypothesis import strategies as st
from journal.cases import Net, learn, same, state

import fastlora

TASKS = st.lists(st.tuples(names | st.just(""), st.sampled_from([0.0, 0.6, 50.0]), st.floats(-2, 2)), max_size=4)


@settings(max_examples=12)
@given(TASKS, st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.booleans())
def test_every_state_is_rebuilt(tasks, dtype, stochastic):
    """Thresholds that leave all, some and none of the ranks."""
    model = Net(dtype=dtype)
    states = [state(model)]
    with tempfile.TemporaryDirectory() as folder:
        journal = fastlora.Journal(folder)
        for number, (name, kappa, scaling) in enumerate(tasks, 1):
            learn(model, number)
            for _, adapter in fastlora.adapters(model):
                adapter.kappa, adapter.scaling = kappa, scaling
            options = {"rounding": "stochastic", "seed": number} if stochastic else {}
            journal.append(model, name, **options)
            fastlora.merge(model, **options)
            states.append(state(fastlora.remove(model)))
        assert [entry.name for entry in journal] == [name for name, _, _ in tasks]
        for after, expected in enumerate(states):
            again = Net(dtype=dtype)
            fastlora.Journal(folder).rebuild(again, after=after)
            assert same(state(again), expected), after
