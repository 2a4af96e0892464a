"""Thresholds, ranks, factors and words that a layer, an op or the optimizer does not take."""

from __future__ import annotations

import copy
from functools import partial

import torch
from faults.case import Outcome, group
from faults.judge import refused, right, same, their_refusal, worst
from faults.models import RANK, K, N, module_lists, operands, ours, theirs, trained

import fastlora
from fastlora import FusedRankLoRALinear
from fastlora.ops import rank_lora_linear, soft_threshold
from fastlora.optim import KappaSchedule, ProxAdamW

bad_input = group("bad input")
NAN, INF = float("nan"), float("inf")


@bad_input("forward shows it, prune and merge name the gate and change nothing")
def gate_that_is_not_finite() -> Outcome:
    """A gate is NaN or infinite: |NaN| > kappa is false, so a prune would drop it without a word."""
    outcomes = []
    for value in (NAN, INF, -INF):
        model = ours()
        model[2].gate.data[1] = value
        outcomes.append(right(not model(torch.randn(4, K)).isfinite().all(), f"a gate of {value} is hidden"))
        for work in (fastlora.prune, fastlora.merge):
            outcomes.append(refused(partial(work, model), "2.gate holds 1 non-finite", keeps=[model]))
    return worst(outcomes)


# ---- thresholds


def _kappa_goes_to(value: object) -> list:
    layer, optimizer = trained(), ProxAdamW(trained(), lr=0.1)
    return [
        lambda: setattr(layer, "kappa", value),
        lambda: FusedRankLoRALinear(K, N, RANK, kappa=value),
        lambda: rank_lora_linear(*operands(), value),
        lambda: soft_threshold(torch.randn(3), value),
        lambda: setattr(optimizer, "kappa", value),
        lambda: KappaSchedule(kappa_max=value),
    ]


@bad_input("an error that names it, wherever it is given")
def negative_kappa() -> Outcome:
    """kappa = -0.1 would grow the gates; given to layer, op, optimizer and schedule."""
    return worst(refused(work, "kappa is -0.1", ">= 0") for work in _kappa_goes_to(-0.1))


@bad_input("an error that names it, wherever it is given")
def kappa_that_is_not_finite() -> Outcome:
    """kappa is NaN or infinite: inf - inf is NaN."""
    return worst(refused(work, f"kappa is {value}") for value in (NAN, INF) for work in _kappa_goes_to(value))


@bad_input("an error that names it, wherever it is given; the layer keeps the one that it had")
def kappa_beyond_float32() -> Outcome:
    """kappa = 1e300, finite for Python and infinite for the float32 gates."""
    layer = trained(kappa=0.2)
    kept = refused(lambda: setattr(layer, "kappa", 1e300), "kappa is 1e+300", keeps=[layer])
    return worst([kept, *(refused(work, "kappa is 1e+300") for work in _kappa_goes_to(1e300))])


@bad_input("the frozen layer alone, at rank 0 after a prune")
def huge_kappa() -> Outcome:
    """kappa = 3e38, near the end of float32: every gate is dead."""
    layer, x = trained(), torch.randn(4, K)
    layer.kappa = 3e38
    frozen = torch.nn.functional.linear(x, layer.weight, layer.bias)
    alive, merged = layer(x), copy.deepcopy(layer)
    merged.merge_()
    unchanged = same(alive, frozen) and same(merged.weight, layer.weight)
    return right(unchanged and layer.prune_() == 0 and same(layer(x), frozen), "dead gates still act")


@bad_input("the frozen layer alone; forward, backward, merge and a copy of it work")
def every_gate_dead() -> Outcome:
    """All gates are pruned, so the adapter has rank 0."""
    model, x = ours(kappa=100.0), torch.randn(4, K, requires_grad=True)
    frozen = [layer.weight.clone() for layer in (model[0], model[2])]
    fastlora.prune(model)
    y = model(x)
    y.sum().backward()
    twin = copy.deepcopy(model)
    report = fastlora.merge(model)
    kept = all(same(a, layer.weight) for a, layer in zip(frozen, (model[0], model[2])))
    ranks = [module.kept_rank for module in report]
    return right(kept and ranks == [0, 0] and same(twin(x), y) and x.grad.any(), "rank 0 changes something")


# ---- options


@bad_input("an error that names the rank and says what is accepted")
def rank_that_is_none() -> Outcome:
    """rank = 0, negative, a float, a bool."""
    return worst(
        [refused(lambda r=r: FusedRankLoRALinear(K, N, r), f"rank is {r}", ">= 1") for r in (0, -3)]
        + [refused(lambda r=r: FusedRankLoRALinear(K, N, r), "rank is a", "int") for r in (2.5, True)]
    )


@rank_that_is_none.peft
def _() -> Outcome:
    return worst(their_refusal(lambda r=r: theirs(r=r), "r", "positive") for r in (0, -3))


@bad_input("an error that names it, when it is set and when it is built")
def scaling_that_is_not_finite() -> Outcome:
    """The factor of the update is NaN or infinite."""
    return worst(
        refused(work, f"scaling is {value}")
        for value in (NAN, INF)
        for work in (
            lambda v=value: FusedRankLoRALinear(K, N, RANK, scaling=v),
            lambda v=value: rank_lora_linear(*operands(), 0.0, v),
            lambda v=value: fastlora.ops.merge_(*module_lists(1), scaling=v),
        )
    )


@scaling_that_is_not_finite.peft
def _() -> Outcome:
    return worst(
        their_refusal(
            lambda v=value: theirs(lora_alpha=v)(torch.randn(4, K)), "alpha", accepted="trains on NaN outputs"
        )
        for value in (NAN, INF)
    )


@bad_input("an error that names it")
def dropout_that_is_no_probability() -> Outcome:
    """dropout is 1, negative or NaN."""
    return worst(
        refused(lambda v=value: FusedRankLoRALinear(K, N, RANK, dropout=v), "dropout is") for value in (1.0, -0.1, NAN)
    )


@dropout_that_is_no_probability.peft
def _() -> Outcome:
    return worst(
        their_refusal(lambda v=value: theirs(lora_dropout=v), "dropout", accepted=f"dropout of {value}")
        for value in (1.5, -0.1, NAN)
    )


@bad_input("an error that names it and lists what is accepted")
def unknown_words() -> Outcome:
    """backend, operator, gate_init and rounding that do not exist."""
    return worst(
        [
            refused(lambda: rank_lora_linear(*operands(), backend="cuda"), "backend 'cuda' is unknown", "'triton'"),
            refused(lambda: soft_threshold(torch.randn(3), 0.1, operator="soft"), "operator 'soft'", "'exact'"),
            refused(lambda: FusedRankLoRALinear(K, N, RANK, gate_init="zeros"), "gate_init 'zeros'", "'ones'"),
            refused(lambda: fastlora.ops.merge_(*module_lists(1), rounding="up"), "rounding 'up'", "'stochastic'"),
        ]
    )
