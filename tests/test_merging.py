"""`fastlora.merge` and `unmerge`: all of a model, or nothing. What is merged is compared in tests/ops and tests/test_adapt.py."""

import copy
import os
import signal

import pytest
import torch
from torch import nn

import fastlora
from fastlora.modules.adapter import RankAdapter


def train_adapters(model):
    for _, adapter in fastlora.adapters(model):
        adapter.lora_b.data.normal_(std=0.1)


def in_place(model):
    """What the model computes with: each weight with the update of its adapter."""
    return [adapter.weight.detach() + adapter.delta_weight() for _, adapter in fastlora.adapters(model)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_merge_waits_for_its_end(monkeypatch, number):
    """It would leave updates in the weights and in the adapters both."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    fastlora.inject(model, rank=2, where=["*"])
    train_adapters(model)
    before, set_, calls = in_place(model), RankAdapter._set, []

    def interrupted(self, *tensors):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        set_(self, *tensors)

    monkeypatch.setattr(RankAdapter, "_set", interrupted)
    handler = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            fastlora.merge(model)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, handler)
    assert len(calls) == 3 and all(not adapter.lora_b.any() for _, adapter in fastlora.adapters(model))
    for ours, theirs in zip(in_place(model), before):
        torch.testing.assert_close(ours, theirs)


def test_what_fails_beside_a_merge_fails_before_it(monkeypatch):
    """No memory for the fresh adapter of the second module."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fastlora.inject(model, rank=2, where=["*"])
    train_adapters(model)
    before, fresh_tensors = copy.deepcopy(model.state_dict()), RankAdapter.fresh_tensors

    def no_memory(self, generator=None):
        if self is model[1]:
            raise RuntimeError("can't allocate memory")
        return fresh_tensors(self, generator)

    monkeypatch.setattr(RankAdapter, "fresh_tensors", no_memory)
    for merge in (lambda: fastlora.merge(model), lambda: fastlora.unmerge(model), model[1].merge_):
        with pytest.raises(RuntimeError, match="can't allocate"):
            merge()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_weight_that_is_tied_to_another_is_not_merged():
    """One parameter in two places, and two parameters over one memory."""
    for tie in (lambda weight: weight, lambda weight: nn.Parameter(weight.detach())):
        model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
        model["head"].weight = tie(model["embed"].weight)
        with pytest.warns(UserWarning, match="one tensor under 2 names"):
            fastlora.inject(model, rank=2, where=["head"])
        train_adapters(model)
        before = copy.deepcopy(model.state_dict())
        for work in (fastlora.merge, fastlora.unmerge):
            with pytest.raises(ValueError, match="head is one tensor under 2 names .embed.weight, head.weight"):
                work(model)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        model["head"].weight = nn.Parameter(model["head"].weight.detach().clone(), requires_grad=False)
        fastlora.merge(model)
        assert torch.equal(model["embed"].weight, before["embed.weight"])


def test_the_packed_weight_of_an_attention_is_its_own():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 24, bias=False)})
    fastlora.inject(model, rank=2, where=["attn"], targets=("k",))
    fastlora.merge(model)
    model["fc"].weight = model["attn"].in_proj_weight
    with pytest.raises(ValueError, match="attn.k is one tensor under 2 names .attn.in_proj_weight, fc.weight"):
        fastlora.merge(model)
