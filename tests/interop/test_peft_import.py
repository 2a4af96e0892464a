"""What PEFT saved computes the same here; what gated adapters do not compute is refused, and the model is untouched."""

import copy
import json
import shutil
import warnings

import pytest
import torch
from interop.models import (
    CASES,
    Case,
    adapted,
    clip,
    content,
    custom_attention,
    error,
    llama,
    load,
    sequential,
    unchanged,
)
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import fastlora

# PEFT's tensors are taken as they are; the scaling times a gate is rounded to float32 at each call
EXACT = torch.finfo(torch.float32).eps


def saved(case, directory, config, train=None):
    """An adapter by PEFT with every tensor drawn, on disk."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(case.copy(), config)
        generator = torch.Generator().manual_seed(5)
        for name, parameter in model.named_parameters():
            if "lora_" in name and "out_proj" not in name:
                parameter.data.normal_(0, 0.3, generator=generator)
        if train is not None:
            train(model)
        model.save_pretrained(directory)
    return directory


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
        refused(case.copy(), tmp_path, r"updates attn.out_proj.*adds that twice|two updates of attn.out_proj")


def refused(model, directory, message, error=ValueError):
    before = content(model)
    with pytest.raises(error, match=message):
        fastlora.import_peft(model, directory)
    assert unchanged(model, before)


def rewrite(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="session")
def peft_directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "peft"
    return saved(sequential(), folder, LoraConfig(r=2, target_modules=["2.0", "2.1"]))


@pytest.fixture
def directory(peft_directory, tmp_path):
    return shutil.copytree(peft_directory, tmp_path / "peft")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "has use_dora=True: DoRA scales the rows .* Merge it with PEFT .merge_and_unload"),
        ({"bias": "lora_only"}, "has bias='lora_only': biases of the base model were trained .* Merge it with PEFT"),
        ({"modules_to_save": ["1"]}, "has modules_to_save=.'1'.: whole modules were trained .* Merge it with PEFT"),
        ({"lora_bias": True}, "lora_bias=True: the adapters have biases"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', a start that changes the base weights"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"kasa_config": {"beta": 1}}, "kasa_config=.*not known here"),
        ({"use_something_of_2030": True}, "use_something_of_2030=True: what that computes is not known here"),
        ({"peft_type": "LOHA"}, "has peft_type 'LOHA'; 'LORA' and 'ADALORA' are accepted"),
        ({"peft_type": None}, "has peft_type None"),
        ({"r": 3}, "2.[01] has rank 2, and adapter_config.json says 3. Restore both files of one adapter"),
        ({"r": "2"}, "cannot be understood .ValueError: '2' is no rank"),
        ({"lora_alpha": float("nan")}, "nan is no alpha"),
        ({"rank_pattern": {"2.0": True}}, "True is no rank"),
        ({"alpha_pattern": {"(": 2}}, "cannot be understood"),
        ({"alpha_pattern": ["2.0"]}, "a pattern is a list"),
        ({"target_modules": "("}, "cannot be understood"),
        ({"target_modules": 3}, "cannot be understood"),
        ({"target_modules": ["0", "2.1"]}, "holds no update of 0, which adapter_config.json asks for"),
    ],
)
def test_configurations_that_are_refused(directory, changes, message):
    rewrite(directory, **changes)
    refused(sequential().copy(), directory, message)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "null", '"LORA"'])
def test_a_configuration_that_is_none(directory, text):
    (directory / "adapter_config.json").write_text(text)
    refused(sequential().copy(), directory, "adapter_config.json (is no JSON|has peft_type None)")


KEY = "base_model.model.2.0.lora_A.weight"


def without(key):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name != key}


def with_tensors(**kwargs):
    return lambda tensors: tensors | {name.replace("__", "."): tensor for name, tensor in kwargs.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(KEY), "is incomplete: it lacks lora_A of 2.0"),
        (lambda tensors: {k: t for k, t in tensors.items() if ".2.0." not in k}, "holds no update of 2.0"),
        (lambda tensors: {}, "holds no update of 2.0, 2.1"),
        (lambda tensors: tensors | {KEY: torch.ones(2, 9)}, r"update of 2.0 has shapes \[2, 9\] and \[16, 2\].*takes \[2, 8\]"),
        (lambda tensors: tensors | {KEY: torch.ones(3, 8)}, r"2.0 has lora_A \[3, 8\], lora_B \[16, 2\]; \[R, K\]"),
        (lambda tensors: tensors | {KEY: torch.ones(2, 8, 1)}, "2.0 has lora_A .2, 8, 1."),
        (lambda tensors: tensors | {KEY: torch.ones(())}, "2.0 has lora_A"),
        (lambda tensors: tensors | {KEY: torch.full((2, 8), float("nan"))}, "2.0 holds non-finite values"),
        (lambda tensors: tensors | {KEY: torch.ones(2, 8, dtype=torch.int32)}, "2.0 is of torch.int32"),
        (with_tensors(base_model__model__2__0__bias=torch.ones(16)), "holds base_model.model.2.0.bias; .lora_A.weight and"),
        (with_tensors(base_model__model__2__0__lora_magnitude_vector=torch.ones(16)), "lora_magnitude_vector; .*merge_and"),
        (with_tensors(other=torch.ones(2)), "holds other; "),
        (with_tensors(**{"../../x.lora_A.weight": torch.ones(2)}), "holds ../../x.lora_A.weight; "),
    ],
)  # fmt: skip
def test_tensors_that_are_refused(directory, change, message):
    path = directory / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    refused(sequential().copy(), directory, message)


@pytest.mark.parametrize("name", ["..", "__class__", "2.__init__", "2.0.weight", "", "2..0", "2.9", "9" * 5000])
def test_hostile_names_in_a_file(directory, name):
    path = directory / "adapter_model.safetensors"
    extra = {f"base_model.model.{name}.lora_{k}.weight": torch.ones(2, 2) for k in "AB"}
    save_file(load_file(path) | extra, path)
    refused(
        sequential().copy(),
        directory,
        "adapts .*, and the model has no such layer|which is a Seq",
        (ValueError, TypeError),
    )


def test_a_layer_that_is_not_linear(directory):
    path = directory / "adapter_model.safetensors"
    save_file(load_file(path) | {f"base_model.model.1.lora_{k}.weight": torch.ones(2, 2) for k in "AB"}, path)
    refused(sequential().copy(), directory, "adapts '1', which is a GELU here", TypeError)


def test_damaged_files(directory):
    path = directory / "adapter_model.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-20], whole[:5], b"", b"\x80\x04pickle", b"\xff" * 100):
        path.write_bytes(damaged)
        refused(sequential().copy(), directory, "adapter_model.safetensors is not a readable safetensors file")


def test_a_pickle_is_not_opened(directory):
    (directory / "adapter_model.safetensors").unlink()
    refused(sequential().copy(), directory, "holds no adapter_model.safetensors", FileNotFoundError)
    (directory / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    refused(
        sequential().copy(), directory, "adapter_model.bin is a pickle, which may run code.*save_pretrained it again"
    )


def test_a_directory_of_another_kind(tmp_path):
    refused(
        sequential().copy(), tmp_path, "holds no adapter_config.json; give a directory that PEFT", FileNotFoundError
    )
    refused(sequential().copy(), tmp_path / "none", "holds no adapter_config.json", FileNotFoundError)


def test_another_model(directory, tmp_path):
    refused(nn.Sequential(nn.Linear(8, 8)), directory, "adapts '2.0', and the model has no such layer .near: 0.")
    wider = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 4)))
    refused(wider, directory, r"update of 2.0 has shapes .*the weight here is \[32, 8\]")
    saved(llama(), tmp_path / "llama", LoraConfig(target_modules=["q_proj"], layers_to_transform=[0]))
    rewrite(tmp_path / "llama", layers_to_transform=None)
    refused(llama().copy(), tmp_path / "llama", "holds no update of model.layers.1.self_attn.q_proj")


def test_a_model_with_other_adapters(directory):
    model = adapted(sequential())
    refused(model, directory, "the model has adapters that .* says nothing of: 0. Call fastlora.remove")
    fastlora.remove(model)
    fastlora.import_peft(model, directory)
    assert error(sequential(), model, load(sequential(), directory)) < EXACT


def test_an_attention_that_is_adapted_in_other_parts(tmp_path):
    case = custom_attention()
    fastlora.export_peft(adapted(case, targets=["q", "v"]), tmp_path / "peft")
    model = adapted(case, targets=["q"])
    refused(
        model, tmp_path / "peft", "adapts '.*attn.v', and the model has no such layer.*fastlora.remove.model. first"
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
