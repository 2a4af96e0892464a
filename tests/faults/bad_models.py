"""Models and places that adapters cannot go into, and places where they would not act."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from faults.case import Outcome, group
from faults.judge import refused, right, short, their_refusal, worst
from faults.models import RANK, Block, K, N, ours, theirs, trained, two_linears
from torch import nn

import fastlora
from fastlora import FusedRankLoRALinear

bad_input = group("bad input")


@bad_input("an error with the nearest names; the model is as it was")
def pattern_that_matches_nothing() -> Outcome:
    """A name with a typing error, a predicate that selects nothing, a tower that does not exist."""
    model = nn.Sequential()
    model.add_module("q_proj", nn.Linear(K, N))
    told = {"near: ['q_proj']": ["*.q_prj"], "the predicate selected none": lambda name, module: False}
    told["'visoin' is no tower"] = "visoin"
    return worst(
        refused(lambda w=where: fastlora.inject(model, RANK, where=w), text, keeps=[model])
        for text, where in told.items()
    )


@pattern_that_matches_nothing.peft
def _() -> Outcome:
    model = two_linears()
    return their_refusal(lambda: theirs(model, where=["q_prj"]), "q_prj", "not found", keeps=[model])


@bad_input("an error that says what to do instead; the model is as it was")
def model_that_is_itself_a_linear() -> Outcome:
    """inject() replaces modules inside of a model; here there is no inside."""
    model = nn.Linear(K, N)
    return refused(lambda: fastlora.inject(model, RANK, where=["*"]), "from_linear", keeps=[model])


@bad_input("an error that says remove() first; the adapters go on as they were")
def adapters_into_adapters() -> Outcome:
    """The same model is given adapters twice."""
    model, layer = ours(), trained()
    return worst(
        [
            refused(lambda: fastlora.inject(model, RANK, where=["0"]), "adapted already", "remove", keeps=[model]),
            refused(lambda: FusedRankLoRALinear.from_linear(layer), "already has", "remove", keeps=[layer]),
        ]
    )


@adapters_into_adapters.peft
def _() -> Outcome:
    x, model = torch.randn(4, K), theirs()
    before = model(x)
    found = their_refusal(lambda: theirs(model.base_model.model), "second time", accepted="adapted twice")
    if found.verdict != "survived" and torch.allclose(model(x), before):
        return Outcome("survived", f"{found.seen}; the first adapter goes on")
    return found


@bad_input("an error that names the option; the model is as it was")
def bad_option_for_many_layers() -> Outcome:
    """An option that no layer takes, found before the first layer has changed."""
    options: list[dict[str, Any]] = [{"kappa": -1.0}, {"gate_init": "zeros"}, {"dropout": 2.0}, {"colour": 1}]
    outcomes = []
    for option in options:
        model = two_linears()
        kinds = [type(module) for module in model]
        work = partial(fastlora.inject, model, RANK, where=["0", "2"], **option)
        found = refused(work, *option, keeps=[model])
        plain = kinds == [type(module) for module in model] and all(p.requires_grad for p in model.parameters())
        outcomes.append(found if plain else Outcome("half done", f"{found.seen}, and adapted some"))
    return worst(outcomes)


@bad_option_for_many_layers.peft
def _() -> Outcome:
    model = two_linears()
    return their_refusal(lambda: theirs(model, lora_dropout=2.0), "dropout", keeps=[model])


def _trains(model: nn.Module) -> bool:
    model(torch.randn(2, 7, 16)).square().sum().backward()
    trainable = [p for p in model.parameters() if p.requires_grad]
    return bool(trainable) and all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainable)


@bad_input("an error that names the attention; by way of it, the adapter trains and is merged once")
def out_proj_of_an_attention() -> Outcome:
    """nn.MultiheadAttention reads out_proj.weight and never calls out_proj: an adapter there would not train."""
    model, x = Block(), torch.randn(2, 7, 16)
    alone = refused(lambda: fastlora.inject(model, RANK, where=["*out_proj"]), "never train", "'attn'", keeps=[model])
    model = ours(model, where=["attn"], targets=("out",))
    trains, before = _trains(model), model(x)
    expected = model.attn.out_proj.weight + model.attn.out_proj.delta_weight()
    fastlora.merge(model)
    once = torch.allclose(model.attn.out_proj.weight, expected, atol=1e-5)
    return worst([alone, right(trains and once and torch.allclose(model(x), before, atol=1e-4), "not once")])


@out_proj_of_an_attention.peft
def _() -> Outcome:
    try:
        model = theirs(Block(), where=["out_proj", "fc"])
    except Exception as error:
        return Outcome("survived" if "out_proj" in str(error) else "unclear error", short(error))
    return right(_trains(model), "an adapter that never trains")


def _evaluates_as_it_trains(model: nn.Module) -> bool:
    x = torch.randn(2, 5, 16)
    model.eval()
    with torch.no_grad():
        evaluated = model(x)
    return torch.allclose(evaluated, model(x), atol=1e-5)


@bad_input("an error that names the fast path; with its attention, evaluation computes what training does")
def fast_path_of_a_transformer_layer() -> Outcome:
    """nn.TransformerEncoderLayer reads weights in evaluation without calling the layers that hold them."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    alone = refused(lambda: fastlora.inject(layer, RANK, where=["linear1"]), "fast path", "self_attn", keeps=[layer])
    model = ours(layer, where=["linear1", "self_attn"])
    return worst([alone, right(_evaluates_as_it_trains(model), "evaluation leaves the adapters out")])


@fast_path_of_a_transformer_layer.peft
def _() -> Outcome:
    model = theirs(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0), where=["linear1"])
    return right(_evaluates_as_it_trains(model), "evaluation leaves the adapter out")


@bad_input("an error that names both places; the model is as it was")
def one_module_in_two_places() -> Outcome:
    """A layer that is used twice: an adapter would replace it in one of the places."""
    shared = nn.Linear(K, K)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    return refused(lambda: fastlora.inject(model, RANK, where=["*"]), "0 and 2 are one module", keeps=[model])


@one_module_in_two_places.peft
def _() -> Outcome:
    shared, x = nn.Linear(K, K), torch.randn(4, K)
    model = theirs(nn.Sequential(shared, nn.Tanh(), shared), where=["0", "2"])
    before = model(x)
    model.merge_adapter()
    return right(torch.allclose(model(x), before, atol=1e-5), "the merge is not what was trained")


class Odd(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


@bad_input("an error that names the class, or its own result kept")
def linear_with_a_forward_of_its_own() -> Outcome:
    """A subclass of nn.Linear that computes something else."""
    model = nn.Sequential(Odd(K, N))
    return refused(lambda: fastlora.inject(model, RANK, where=["0"]), "Odd", "forward of its own", keeps=[model])


@linear_with_a_forward_of_its_own.peft
def _() -> Outcome:
    odd, x = Odd(K, N), torch.randn(4, K)
    expected = odd(x).detach()
    model = theirs(nn.Sequential(odd), where=["0"], size=0.0)
    return right(torch.allclose(model(x), expected, atol=1e-6), "another result")


@bad_input("an error that names it; the model is as it was")
def attention_with_unsupported_options() -> Outcome:
    """Separate widths for keys and values, a bias for keys, a zero attention."""
    options: list[dict[str, Any]] = [{"kdim": 8, "vdim": 8}, {"add_bias_kv": True}, {"add_zero_attn": True}]
    told = ("kdim, vdim", "bias_k / bias_v", "add_zero_attn")
    outcomes = []
    for option, text in zip(options, told):
        model = Block()
        model.attn = nn.MultiheadAttention(16, 2, **option)
        outcomes.append(refused(lambda m=model: fastlora.inject(m, RANK, where=["attn"]), text, keeps=[model]))
    return worst(outcomes)


@bad_input("an error with both shapes, and the adapter is as it was")
def state_of_another_width() -> Outcome:
    """load_state_dict() of a layer that is wider and has another rank."""
    layer, other = trained(), trained(k=K + 1, rank=RANK - 1)
    adapter = [layer.lora_a, layer.lora_b, layer.gate]
    return refused(lambda: layer.load_state_dict(other.state_dict()), "lora_a", "[3, 7]", keeps=adapter)


@state_of_another_width.peft
def _() -> Outcome:
    model = theirs()
    other = theirs(nn.Sequential(nn.Linear(K + 1, 8), nn.Tanh(), nn.Linear(8, N)), r=RANK - 1)
    adapter = [p for p in model.parameters() if p.requires_grad]
    return their_refusal(lambda: model.load_state_dict(other.state_dict()), "lora_A", "[3, 7]", keeps=adapter)


@bad_input("an error that says what is missing")
def optimizer_without_gates() -> Outcome:
    """ProxAdamW over a plain model, and over groups that do not say which of them are gates."""
    model = two_linears()
    return worst(
        [
            refused(lambda: fastlora.optim.ProxAdamW(model, lr=0.1), "no trainable adapter", "inject"),
            refused(lambda: fastlora.optim.ProxAdamW([{"params": list(model.parameters())}], lr=0.1), "'prox'"),
        ]
    )
