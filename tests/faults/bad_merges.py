"""Merges of what must not be merged, or not twice."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from faults.case import Outcome, group
from faults.judge import refused, right, same, their_refusal, worst
from faults.models import RANK, K, N, module_lists, ours, their_layers, theirs, two_linears
from torch import nn

import fastlora
from fastlora.ops import merge_, new_residuals

bad_input = group("bad input")
NAN = float("nan")


# ---- adapters that must not go into a weight


def _spoil(model: nn.Module, adapter: int, key: str, value: float) -> nn.Module:
    getattr([each for _, each in fastlora.adapters(model)][adapter], key).data.view(-1)[0] = value
    return model


def _their_spoilt(adapter: int) -> Any:
    model = theirs()
    their_layers(model)[adapter].lora_A["default"].weight.data[0, 0] = NAN
    return model


def their_merge(model: Any, *told: str) -> Outcome:
    """PEFT's merge as it comes; what `safe_merge=True` does of the same is told beside it."""
    checked = copy.deepcopy(model)
    asked = their_refusal(lambda: checked.merge_adapter(safe_merge=True), *told, keeps=their_bases(checked))
    found = their_refusal(model.merge_adapter, *told, keeps=their_bases(model), accepted="merged without a word")
    return Outcome(found.verdict, f"{found.seen}; with safe_merge=True: {asked.verdict}", found.counts)


def their_bases(model: Any) -> list[torch.Tensor]:
    return [layer.get_base_layer().weight for layer in their_layers(model)]


@bad_input("an error that names module and tensor; not one byte of a weight has changed")
def merge_of_one_bad_adapter() -> Outcome:
    """NaN or infinity in lora_a, lora_b or gate of the only adapter."""
    return worst(
        refused(lambda: fastlora.merge(model), f"0{'.' if key == 'gate' else ': '}{key} holds", keeps=[model])
        for key in ("lora_a", "lora_b", "gate")
        for value in (NAN, float("inf"))
        if (model := _spoil(ours(where=["0"]), 0, key, value))
    )


@merge_of_one_bad_adapter.peft
def _() -> Outcome:
    model = theirs(where=["0"])
    their_layers(model)[0].lora_A["default"].weight.data[0, 0] = NAN
    return their_merge(model, "NaN")


@bad_input("an error that names the second; no weight of any module has changed")
def merge_with_a_bad_second_adapter() -> Outcome:
    """NaN in the second of several adapters."""
    return worst(
        refused(lambda: fastlora.merge(model), "2", f"{key} holds 1 non-finite", keeps=[model])
        for key in ("lora_a", "lora_b", "gate")
        if (model := _spoil(ours(), 1, key, NAN))
    )


@merge_with_a_bad_second_adapter.peft
def _() -> Outcome:
    return their_merge(_their_spoilt(1), "NaN")


@bad_input("an error that names the residual; nothing has changed")
def merge_with_a_bad_residual() -> Outcome:
    """A residual is NaN, of another shape, another dtype, or missing."""
    lists = module_lists(2, torch.float16)
    bad = new_residuals(lists[0])
    bad[1][0, 0] = NAN
    told = {"residual holds 1 non-finite": bad, "residuals 1": bad[:1]}
    told["residual of weights[1] is [3, 3]"] = [bad[0], torch.zeros(3, 3, dtype=torch.float16)]
    told["residual of weights[1] has dtype torch.float64"] = [bad[0], bad[1].double()]
    return worst(refused(lambda r=r: merge_(*lists, residuals=r), text, keeps=lists[0]) for text, r in told.items())


@bad_input("an error that says what is accepted; nothing has changed")
def lists_that_do_not_fit() -> Outcome:
    """A tensor for a list, lists of different lengths, gates of one row a sample, shapes that do not fit."""
    lists = module_lists(2)
    w, a, b, g = lists
    calls = {
        "weights is a Tensor": lambda: merge_(torch.zeros(2, 12, 10), a, b, g),
        "different lengths": lambda: merge_(w, a[:1], b, g),
        "one row a sample": lambda: merge_(w, a, b, [g[0], torch.randn(3, RANK)]),
        "lora_a of weights[1] has shape": lambda: merge_(w, [a[0], a[1][:, 1:]], b, g),
        "lora_b of weights[1] has shape": lambda: merge_(w, a, [b[0], b[1][1:]], g),
    }
    return worst(refused(call, told, keeps=w) for told, call in calls.items())


@bad_input("an error that says which call comes first")
def merge_without_adapters() -> Outcome:
    """merge and prune of a plain model."""
    model = two_linears()
    return worst(refused(lambda f=f: f(model), "has no adapters", "inject", keeps=[model])
                 for f in (fastlora.merge, fastlora.prune))  # fmt: skip


# ---- once, and in its time


@bad_input("the update is in the weights once")
def merge_twice() -> Outcome:
    """The same model is merged, and merged again."""
    model = ours()
    expected = [a.weight + a.delta_weight() for _, a in fastlora.adapters(model)]
    fastlora.merge(model)
    once = [a.weight.clone() for _, a in fastlora.adapters(model)]
    fastlora.merge(model)
    found = [a.weight for _, a in fastlora.adapters(model)]
    right_once = all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected))
    return right(right_once and all(map(same, once, found)), "the update was added twice")


@merge_twice.peft
def _() -> Outcome:
    model = theirs()
    model.merge_adapter()
    once = [base.clone() for base in their_bases(model)]
    model.merge_adapter()
    return right(all(map(same, once, their_bases(model))), "the update was added twice")


@bad_input("the outputs of the merged model")
def state_of_a_merged_model_loaded_again() -> Outcome:
    """state_dict() of a model after its merge, loaded into a new model with adapters."""
    x, model = torch.randn(4, K), ours()
    before = model(x)
    fastlora.merge(model)
    other = ours()
    other.load_state_dict(model.state_dict())
    return right(torch.allclose(other(x), before, atol=1e-5), "the update acts twice")


@state_of_a_merged_model_loaded_again.peft
def _() -> Outcome:
    x, model = torch.randn(4, K), theirs()
    before = model(x)
    model.merge_adapter()
    other = theirs()
    other.load_state_dict(model.state_dict())
    return right(torch.allclose(other(x), before, atol=1e-5), "the update acts twice")


def _copies(model: Any) -> list[Any]:
    return [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]


@bad_input("the outputs of the merged model, and weights of their own")
def copies_of_a_merged_model() -> Outcome:
    """deepcopy and pickle of a model after its merge."""
    model, x = ours(), torch.randn(4, K)
    fastlora.merge(model)
    twins = _copies(model)
    return right(all(same(twin(x), model(x)) and twin[0].weight is not model[0].weight for twin in twins), "another")


@copies_of_a_merged_model.peft
def _() -> Outcome:
    model, x = theirs(), torch.randn(4, K)
    model.merge_adapter()
    return right(all(same(twin(x), model(x)) for twin in _copies(model)), "another result")


@bad_input("backward raises, since the weights that it needs are gone")
def merge_between_forward_and_backward() -> Outcome:
    """The gradient of x would be taken with weights that forward did not have."""
    model, x = ours(), torch.randn(4, K, requires_grad=True)
    loss = model(x).sum()
    fastlora.merge(model)
    return refused(loss.backward, "modified by an inplace operation")


@merge_between_forward_and_backward.peft
def _() -> Outcome:
    model, x = theirs(nn.Sequential(nn.Linear(K, N)), where=["0"]), torch.randn(4, K, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).sum(), [x])
    loss = model(x).sum()
    model.merge_adapter()

    def backward() -> None:
        (found,) = torch.autograd.grad(loss, [x])
        assert not torch.allclose(found, expected)

    return their_refusal(backward, "inplace", accepted="a gradient of other weights than forward had")
