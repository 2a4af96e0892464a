"""Models by name, from files, and without weights."""

import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from fastlora.continual.clip_model import load_clip
from fastlora.continual.config import UsageError

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """What a test makes known to open_clip is forgotten after it."""
    monkeypatch.setattr("open_clip.factory._MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    monkeypatch.setattr("open_clip.factory._MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))


@pytest.fixture
def files(tmp_path):
    """(config, weights, the state of a model of random weights)."""
    path = tmp_path / "tiny_for_tests.json"
    path.write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    model = open_clip.CLIP(**json.loads(path.read_text()))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    save_file(state, tmp_path / "tiny.safetensors")
    return str(path), str(tmp_path / "tiny.safetensors"), state


def test_from_files(files):
    clip = load_clip(files[0], files[1])
    assert clip.model.state_dict().keys() == files[2].keys() and not clip.model.training
    assert all(torch.equal(value, files[2][key]) for key, value in clip.model.state_dict().items())
    assert clip.tokenizer(["a dog"]).shape == (1, 16) and clip.transforms.size == (16, 16)
    assert clip.transforms.scale == (0.9, 1.0)
    load_clip(files[0], files[1])  # a second time in one process


def test_an_archive_as_openai_publishes_them(files, tmp_path):
    """Half-precision weights in TorchScript, with the activation that they were trained with."""

    class Holder(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    model = open_clip.CLIP(**json.loads(json.dumps(CONFIG)))
    model.load_state_dict(files[2])
    holder = Holder()
    for name, child in model.named_children():
        holder.add_module(name, child)
    for name, value in model.named_parameters(recurse=False):
        holder.register_parameter(name, value)
    torch.jit.trace(holder.half(), torch.zeros(1)).save(str(tmp_path / "ViT.pt"))
    clip = load_clip(files[0], str(tmp_path / "ViT.pt"))
    assert type(clip.model.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    for key, value in clip.model.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, files[2][key].half().float())
    plain = load_clip(*files[:2])
    assert type(plain.model.visual.transformer.resblocks[0].mlp.gelu).__name__ == "GELU"


def test_a_tag_decides_the_activation(monkeypatch):
    """ViT-B-16 has GELU in open_clip, its openai weights were trained with QuickGELU."""
    asked = {}

    def create(name, **options):
        asked.update(options, name=name)
        raise OSError("no network")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    for tag, quick in (("openai", True), ("laion2b_s34b_b88k", False)):
        with pytest.raises(RuntimeError):
            load_clip("ViT-B-16", tag)
        assert asked["force_quick_gelu"] is quick and asked["weights_only"]


def test_without_a_network_the_file_is_named(monkeypatch):
    def create(*_, **__):
        raise OSError("name resolution failed")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    with pytest.raises(RuntimeError) as error:
        load_clip("ViT-B-16", "openai")
    for part in (
        "the weights 'openai' of ViT-B-16 cannot be had here (name resolution failed)",
        "open_clip_model.safetensors of timm/vit_base_patch16_clip_224.openai",
        "/ViT-B-16.pt",
        "--model ViT-B-16-quickgelu --pretrained PATH/OF/THE/FILE",
    ):
        assert part in str(error.value)


def test_weights_of_another_architecture(files, tmp_path):
    state = dict(files[2])
    state["visual.proj"] = torch.zeros(3, 3)
    save_file(state, tmp_path / "other.safetensors")
    (tmp_path / "none.pt").write_bytes(b"no weights")
    for name in ("other.safetensors", "none.pt"):
        with pytest.raises(RuntimeError, match=f"{name} cannot be loaded into .*of this architecture"):
            load_clip(files[0], str(tmp_path / name))


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("ViT-B-61", "openai", r"model is 'ViT-B-61', which is none of open_clip's \d+; near: .*ViT-B-16"),
        ("ViT-B-16", "opanai", "neither a file nor a tag of ViT-B-16; tags: openai, .*Did you mean 'openai'"),
        ("absent.json", "x", "model is 'absent.json', which cannot be read as JSON"),
    ],
)
def test_names_that_do_not_exist(model, pretrained, message):
    with pytest.raises(UsageError, match=message):
        load_clip(model, pretrained)


def test_a_config_that_describes_no_model(tmp_path):
    (tmp_path / "half.json").write_text('{"embed_dim": 3}')
    with pytest.raises(UsageError, match="half.json has no vision_cfg, text_cfg"):
        load_clip(str(tmp_path / "half.json"), "x")
    (tmp_path / "ViT-B-16.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UsageError, match="has the name of another model of open_clip"):
        load_clip(str(tmp_path / "ViT-B-16.json"), "x")
