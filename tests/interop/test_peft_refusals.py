"""What PEFT saved and gated adapters do not compute, or what is damaged, is refused, and the model is untouched."""

import shutil

import pytest
import torch
from interop.models import adapted, custom_attention, error, llama, load, refused, rewrite, saved, sequential
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

import fastlora


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
    refused(fastlora.import_peft, sequential().copy(), directory, message)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "null", '"LORA"'])
def test_a_configuration_that_is_none(directory, text):
    (directory / "adapter_config.json").write_text(text)
    refused(fastlora.import_peft, sequential().copy(), directory, "adapter_config.json (is no JSON|has peft_type None)")


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
    refused(fastlora.import_peft, sequential().copy(), directory, message)


@pytest.mark.parametrize("name", ["..", "__class__", "2.__init__", "2.0.weight", "", "2..0", "2.9", "9" * 5000])
def test_hostile_names_in_a_file(directory, name):
    path = directory / "adapter_model.safetensors"
    extra = {f"base_model.model.{name}.lora_{k}.weight": torch.ones(2, 2) for k in "AB"}
    save_file(load_file(path) | extra, path)
    refused(
        fastlora.import_peft,
        sequential().copy(),
        directory,
        "adapts .*, and the model has no such layer|which is a Seq",
        (ValueError, TypeError),
    )


def test_a_layer_that_is_not_linear(directory):
    path = directory / "adapter_model.safetensors"
    save_file(load_file(path) | {f"base_model.model.1.lora_{k}.weight": torch.ones(2, 2) for k in "AB"}, path)
    refused(fastlora.import_peft, sequential().copy(), directory, "adapts '1', which is a GELU here", TypeError)


def test_damaged_files(directory):
    path = directory / "adapter_model.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-20], whole[:5], b"", b"\x80\x04pickle", b"\xff" * 100):
        path.write_bytes(damaged)
        refused(
            fastlora.import_peft,
            sequential().copy(),
            directory,
            "adapter_model.safetensors is not a readable safetensors file",
        )


def test_a_pickle_is_not_opened(directory):
    (directory / "adapter_model.safetensors").unlink()
    refused(
        fastlora.import_peft, sequential().copy(), directory, "holds no adapter_model.safetensors", FileNotFoundError
    )
    (directory / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    refused(
        fastlora.import_peft,
        sequential().copy(),
        directory,
        "adapter_model.bin is a pickle, which may run code.*save_pretrained it again",
    )


def test_a_directory_of_another_kind(tmp_path):
    refused(
        fastlora.import_peft,
        sequential().copy(),
        tmp_path,
        "holds no adapter_config.json; give a directory that PEFT",
        FileNotFoundError,
    )
    refused(
        fastlora.import_peft, sequential().copy(), tmp_path / "none", "holds no adapter_config.json", FileNotFoundError
    )


def test_another_model(directory, tmp_path):
    refused(
        fastlora.import_peft,
        nn.Sequential(nn.Linear(8, 8)),
        directory,
        "adapts '2.0', and the model has no such layer .near: 0.",
    )
    wider = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 4)))
    refused(fastlora.import_peft, wider, directory, r"update of 2.0 has shapes .*the weight here is \[32, 8\]")
    saved(llama(), tmp_path / "llama", LoraConfig(target_modules=["q_proj"], layers_to_transform=[0]))
    rewrite(tmp_path / "llama", layers_to_transform=None)
    refused(
        fastlora.import_peft, llama().copy(), tmp_path / "llama", "holds no update of model.layers.1.self_attn.q_proj"
    )


def test_a_model_with_other_adapters(directory):
    model = adapted(sequential())
    refused(
        fastlora.import_peft,
        model,
        directory,
        "the model has adapters that .* says nothing of: 0. Call fastlora.remove",
    )
    fastlora.remove(model)
    fastlora.import_peft(model, directory)
    assert error(sequential(), model, load(sequential(), directory)) < 1e-6


def test_an_attention_that_is_adapted_in_other_parts(tmp_path):
    case = custom_attention()
    fastlora.export_peft(adapted(case, targets=["q", "v"]), tmp_path / "peft")
    model = adapted(case, targets=["q"])
    refused(
        fastlora.import_peft,
        model,
        tmp_path / "peft",
        "adapts '.*attn.v', and the model has no such layer.*fastlora.remove.model. first",
    )
