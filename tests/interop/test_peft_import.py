"""What PEFT saved computes the same here."""

import copy

import pytest
import torch
from interop.models import (
    CASES,
    Case,
    adapted,
    clip,
    error,
    gpt2,
    llama,
    load,
    refused,
    rewrite,
    saved,
)
from peft import AdaLoraConfig, LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

import fastlora

# PEFT's tensors are taken as they are; the scaling times a gate is rounded to float32 at each call
EXACT = torch.finfo(torch.float32).eps

LORAS = {
    "alpha": {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["o_proj", "down_proj"]},
    "regex": {"r": 3, "lora_alpha": 5, "target_modules": r".*\.1\..*(k|up)_proj"},
    "all linear": {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"},
    "excluded": {"r": 2, "target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.0\.self_attn\.k_proj"},
    "some layers": {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "fan_in_fan_out": {"r": 2, "target_modules": ["q_proj"], "fan_in_fan_out": True},
    "parameter": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "target_parameters": ["up_proj.weight"]},
    "pattern of a parameter": {
        "r": 2,
        "target_modules": ["q_proj"],
        "target_parameters": ["up_proj.weight"],
        "rank_pattern": {"up_proj.weight": 3},
        "alpha_pattern": {"up_proj": 50, "1.mlp.up_proj.weight": 4},
    },
    "pattern of a part of a name": {"r": 2, "target_modules": ["gate_proj"], "alpha_pattern": {"ate_proj": 50}},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "k_proj", "gate_proj"],
        "rank_pattern": {"model.layers.0.self_attn.q_proj": 6, r"layers\.\d\.mlp\.gate_proj": 2, "k_proj": 3},
        "alpha_pattern": {"^model.layers.1.self_attn.q_proj": 1, r".*(k|gate)_proj": 7},
    },
    "patterns and rslora": {
        "r": 4, "use_rslora": True, "target_modules": ["q_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 9}
    },
}  # fmt: skip


@pytest.mark.parametrize("name", LORAS)
def test_lora(tmp_path, name):
    case = llama()
    saved(case, tmp_path, LoraConfig(**LORAS[name]))
    model = case.copy()
    report = fastlora.import_peft(model, tmp_path)
    theirs = load(case, tmp_path, quiet="The following (rank|alpha)_pattern keys")  # what PEFT says of its own file
    assert error(case, model, theirs) < EXACT
    assert len(report) == sum("lora_A" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    for _, adapter in fastlora.adapters(model):
        assert adapter.gate.eq(1).all() and adapter.kappa == 0 and adapter.rank == adapter.gate.numel()


@pytest.mark.parametrize("told", [True, False])
def test_layers_whose_weights_are_stored_transposed(tmp_path, told):
    """PEFT's file of a GPT-2, whether or not it was told how the weights lie."""
    case = gpt2()
    saved(case, tmp_path, LoraConfig(r=3, target_modules=["c_attn", "c_proj"], fan_in_fan_out=told))
    model = case.copy()
    report = fastlora.import_peft(model, tmp_path)
    theirs = load(case, tmp_path, quiet="fan_in_fan_out")
    assert error(case, model, theirs) < EXACT and len(report) == 6
    assert all(adapter.transposed for _, adapter in fastlora.adapters(model))
    refused(
        fastlora.import_peft, gpt2_of_another_width(), tmp_path, r"c_attn has shapes .* the weight here is \[48, 16\]"
    )


def gpt2_of_another_width():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, bos_token_id=1, eos_token_id=2, **sizes))


def test_the_word_all_linear_in_a_file(tmp_path):
    case = llama()
    saved(case, tmp_path, LoraConfig(target_modules="all-linear"))
    rewrite(tmp_path, target_modules="all-linear")
    model = case.copy()
    fastlora.import_peft(model, tmp_path)
    assert error(case, model, load(case, tmp_path)) < EXACT


def test_training_goes_on(tmp_path):
    """Everything but the adapters is frozen; a merge starts fresh adapters of the file's rank."""
    case = llama()
    saved(case, tmp_path, LoraConfig(r=3, target_modules=["q_proj"]))
    model = case.copy()
    fastlora.import_peft(model, tmp_path)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.rpartition(".")[2] in ("lora_a", "lora_b", "gate") for name in trained) and len(trained) == 6
    case.run(model).square().mean().backward()
    assert all(p.grad.any() for p in fastlora.adapter_parameters(model))
    fastlora.merge(model)
    assert {a.gate.numel() for _, a in fastlora.adapters(model)} == {3}
    assert error(case, model, load(case, tmp_path)) < 1e-5


def adalora(**kwargs):
    return AdaLoraConfig(init_r=6, target_r=2, total_step=8, tinit=1, tfinal=2, **kwargs)


def allocate(case):
    """As a training run: until ranks have been given up, of some modules all."""

    def train(model):
        for step in range(8):
            case.run(model.base_model.model).square().mean().backward()
            model.base_model.update_and_allocate(step)

    return train


@pytest.mark.parametrize("alpha", [12, 0])
@pytest.mark.parametrize("given_up", [True, False])
def test_adalora(tmp_path, alpha, given_up):
    """lora_E is the gates; the scaling divides by the first rank, plus 1e-5, also after ranks were given up."""
    case = llama()
    config = adalora(lora_alpha=alpha, target_modules=["q_proj", "v_proj", "up_proj"])
    saved(case, tmp_path, config, allocate(case) if given_up else None)
    model = case.copy()
    fastlora.import_peft(model, tmp_path)
    theirs = load(case, tmp_path, quiet="The following rank_pattern keys")  # what PEFT says of its own file
    assert error(case, model, theirs) < EXACT
    ranks = {adapter.gate.numel() for _, adapter in fastlora.adapters(model)}
    assert (ranks == {6}) != given_up
    assert all(adapter.active_rank() == adapter.gate.numel() for _, adapter in fastlora.adapters(model))


@pytest.mark.parametrize("name", CASES)
def test_our_own_export_comes_back(tmp_path, name):
    """At its ranks, q, k and v apart again; into the plain model and into one that is adapted in the same places."""
    case = CASES[name]()
    model = adapted(case)
    fastlora.export_peft(model, tmp_path / "peft")
    imported = case.copy()
    fastlora.import_peft(imported, tmp_path / "peft")
    assert error(case, imported, load(case, tmp_path / "peft")) < EXACT
    kept = {name: a.active_rank() for name, a in fastlora.adapters(model) if a.active_rank()}
    assert {name: a.gate.numel() for name, a in fastlora.adapters(imported) if a.gate.numel()} == kept
    again = copy.deepcopy(imported)
    for _, adapter in fastlora.adapters(again):
        adapter.reset_adapter_()
        adapter.kappa, adapter.scaling = 0.5, 3.0
    fastlora.import_peft(again, tmp_path / "peft")
    assert error(case, again, imported) == 0


def test_in_proj_of_multihead_attention(tmp_path):
    """As PEFT adapts the whole module: its out_proj comes along, and has to be zero."""
    plain = nn.Sequential()
    plain.attn, plain.fc = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 4)
    x = torch.randn(2, 5, 16, dtype=torch.double)

    def run(model):
        inner = getattr(model, "base_model", model)
        return inner.fc(inner.attn(x, x, x, need_weights=False)[0])

    case = Case(plain, run, {})
    saved(case, tmp_path, LoraConfig(r=3, lora_alpha=5, target_modules=["attn", "fc"], rank_pattern={"attn": 2}))
    model = case.copy()
    fastlora.import_peft(model, tmp_path)
    assert error(case, model, load(case, tmp_path)) < EXACT
    assert {a.gate.numel() for name, a in fastlora.adapters(model) if name.startswith("attn")} == {2}
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    for value, key in ((1.0, "base_layer.out_proj"), (1.0, "out_proj")):
        tensors |= {
            f"base_model.model.attn.{key}.lora_A.weight": torch.ones(2, 16),
            f"base_model.model.attn.{key}.lora_B.weight": torch.full((16, 2), value),
        }
        save_file(tensors, path)
        refused(
            fastlora.import_peft,
            case.copy(),
            tmp_path,
            r"updates attn.out_proj.*adds that twice|two updates of attn.out_proj",
        )


def test_two_towers_of_a_clip_in_one_go(tmp_path):
    """Parts that one attention alone has: the others' ranks are 0 there."""
    case = clip()
    model = adapted(case)
    model.transformer.resblocks[0].attn.k.gate.data.zero_()
    fastlora.export_peft(model, tmp_path / "peft")
    imported = case.copy()
    fastlora.import_peft(imported, tmp_path / "peft")
    assert imported.transformer.resblocks[0].attn.k.gate.numel() == 0
    assert error(case, imported, load(case, tmp_path / "peft")) < EXACT
