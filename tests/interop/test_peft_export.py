"""What is exported is what PEFT computes, or nothing is."""

import copy
import json
import os

import pytest
import torch
from interop.models import CASES, adapted, clip, content, custom_attention, error, llama, load, sequential, unchanged
from safetensors.torch import load_file
from torch import nn

import fastlora

# lora_b with the gate in it is rounded once to float32
LIMIT = 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_peft_computes_the_same(tmp_path, name, pruned):
    """At ranks of their own, dead modules left out, with a threshold and a scaling."""
    case = CASES[name]()
    model = adapted(case)
    if pruned:
        fastlora.prune(model)
    before = content(model)
    fastlora.export_peft(model, tmp_path / "peft")
    assert unchanged(model, before)
    assert error(case, model, load(case, tmp_path / "peft")) < LIMIT


@pytest.mark.parametrize("name", ["llama", "clip"])
def test_peft_merges_the_same(tmp_path, name):
    case = CASES[name]()
    model = adapted(case)
    fastlora.export_peft(model, tmp_path / "peft")
    merged = load(case, tmp_path / "peft", case.copy().double()).merge_and_unload()
    assert error(case, model, merged) < LIMIT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "clip"])
def test_half_precision(tmp_path, name, dtype):
    """As near to the exact outputs as ours are, and PEFT leaves the base weights alone."""
    case = CASES[name]()
    model = adapted(case).to(dtype)
    fastlora.export_peft(model, tmp_path / "peft")
    theirs = load(case, tmp_path / "peft", case.copy().to(dtype))
    weights = {n: p.clone() for n, p in theirs.named_parameters() if "lora_" not in n}
    with torch.no_grad():
        exact = case.run(copy.deepcopy(model).double())
        ours, first, second = case.run(model), case.run(theirs), case.run(theirs)
    assert torch.equal(first, second)
    assert all(torch.equal(p, weights[n]) for n, p in theirs.named_parameters() if n in weights)
    limit = 2 * (ours.double() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max() / 8
    assert (first.double() - exact).abs().max() <= limit


def test_ranks_and_names_of_the_directory(tmp_path):
    model = adapted(llama())
    kept = {name: a.active_rank() for name, a in fastlora.adapters(model)}
    assert len(set(kept.values())) > 2 and 0 in kept.values()
    fastlora.export_peft(model, tmp_path / "peft")
    assert sorted(os.listdir(tmp_path / "peft")) == ["adapter_config.json", "adapter_model.safetensors"]
    tensors, config = load_file(tmp_path / "peft/adapter_model.safetensors"), read(tmp_path / "peft")
    ranks = {key: len(t) for key, t in tensors.items() if "lora_A" in key}
    assert ranks == {f"base_model.model.{name}.lora_A.weight": rank for name, rank in kept.items() if rank}
    assert config["r"] == config["lora_alpha"] == max(kept.values())
    assert config["rank_pattern"] == config["alpha_pattern"] and len(config["rank_pattern"]) >= 2
    assert config["target_modules"] == [name for name, rank in kept.items() if rank]


def read(directory):
    return json.loads((directory / "adapter_config.json").read_text())


def test_a_name_that_ends_another_is_not_taken_for_it(tmp_path):
    """PEFT adapts 2.0 too where the target is "0", and transformer.* also below visual; neither is touched."""
    for case, options in ((sequential(), {"where": ["0"]}), (clip(), {"where": "text", "targets": ["k", "v", "fc1"]})):
        model = adapted(case, **options)
        folder = tmp_path / type(case.plain).__name__
        fastlora.export_peft(model, folder)
        assert isinstance(read(folder)["target_modules"], str)
        theirs = load(case, folder)
        assert error(case, model, theirs) < LIMIT
        with torch.no_grad():
            for name, tensor in theirs.named_parameters():
                if "visual" in name and "lora_B" in name:
                    assert not tensor.any()


def test_q_k_and_v_are_one_update_of_the_packed_weight(tmp_path):
    model = adapted(custom_attention())
    fastlora.export_peft(model, tmp_path / "peft")
    parts = [model.block.attn.get_submodule(part) for part in "qkv"]
    lora_b = load_file(tmp_path / "peft/adapter_model.safetensors")["base_model.model.block.attn.lora_B.weight"]
    ranks = [part.active_rank() for part in parts]
    rows, column = lora_b.split(16), 0
    for block, rank in zip(rows, ranks):
        assert block[:, column : column + rank].all(dim=0).all()
        assert block.count_nonzero() == 16 * rank  # and nothing elsewhere
        column += rank


def test_out_proj_of_multihead_attention_is_refused(tmp_path):
    """PEFT adds it twice; where all its ranks are dead there is nothing to refuse."""
    model = adapted(clip(), targets=["q", "out"])
    with pytest.raises(ValueError, match="attn.out_proj.*twice, or never.*Export the merged model instead"):
        fastlora.export_peft(model, tmp_path / "peft")
    assert os.listdir(tmp_path) == []
    for name, adapter in fastlora.adapters(model):
        if name.endswith("out_proj"):
            adapter.gate.data.zero_()
    fastlora.export_peft(model, tmp_path / "peft")
    assert error(clip(), model, load(clip(), tmp_path / "peft")) < LIMIT


def test_a_transformer_encoder_layer_is_refused(tmp_path):
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    fastlora.inject(model, 2, where=["0.self_attn", "0.linear1"], targets=["q"])
    for name in ("0.self_attn", "0.linear1"):
        with pytest.raises(
            ValueError, match="0.self_attn.q, 0.linear1: in evaluation nn.TransformerEncoderLayer reads"
        ):
            fastlora.export_peft(model, tmp_path / name)


def test_what_cannot_be_exported_is_told(tmp_path):
    with pytest.raises(ValueError, match="Sequential has no adapters to export; call fastlora.inject"):
        fastlora.export_peft(sequential().copy(), tmp_path / "peft")
    dead = adapted(sequential(), kappa=100.0)
    with pytest.raises(ValueError, match="none of the 3 adapters has an active rank"):
        fastlora.export_peft(dead, tmp_path / "peft")
    for root in (fastlora.FusedRankLoRALinear(4, 4, 2), attention()):
        with pytest.raises(ValueError, match="the model is itself an adapted"):
            fastlora.export_peft(root, tmp_path / "peft")
    for field, value in (("gate", float("nan")), ("lora_a", float("inf")), ("lora_b", 3e38)):
        broken = adapted(sequential(), scaling=1e3)
        getattr(broken[2][0], field).data.flatten()[:].fill_(value)
        with pytest.raises(ValueError, match="2.0.*non-finite"):
            fastlora.export_peft(broken, tmp_path / "peft")
    assert os.listdir(tmp_path) == []


def attention():
    from fastlora.modules import FusedRankLoRAMultiheadAttention

    return FusedRankLoRAMultiheadAttention(nn.MultiheadAttention(8, 2), ("q",), 2)


def test_nothing_is_overwritten(tmp_path):
    model = adapted(sequential())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("mine", "file"):
        with pytest.raises(FileExistsError, match=f"{name} exists already, and is not overwritten"):
            fastlora.export_peft(model, tmp_path / name)
    assert os.listdir(tmp_path / "mine") == ["notes.txt"] and (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    fastlora.export_peft(model, tmp_path / "empty")
    assert len(os.listdir(tmp_path / "empty")) == 2


@pytest.mark.parametrize(
    "names", [("lora_A", "lora_B"), ("default", "base_layer"), ("a-b", "é ü"), ("all-linear", "^a$")]
)
def test_hostile_names_of_modules(tmp_path, names):
    case = sequential()
    plain = nn.Sequential()
    for name in names:
        plain.add_module(name, nn.Linear(8, 8))
    x = torch.randn(4, 8, dtype=torch.double)
    case = case._replace(plain=plain, run=lambda model: model(x), options={"where": lambda name, module: True})
    model = adapted(case)
    fastlora.export_peft(model, tmp_path / "peft")
    assert error(case, model, load(case, tmp_path / "peft")) < LIMIT
    imported = case.copy()
    fastlora.import_peft(imported, tmp_path / "peft")
    assert error(case, model, imported) < LIMIT
