"""The shipped model: an ordinary open_clip model with strict weights."""

import hashlib
import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastlora.continual.demo import model as demo_model
from fastlora.continual.demo import open_clip_demo
from fastlora.continual.demo.model import WEIGHTS, build_model, load_weights, normalise


@pytest.fixture(scope="module")
def demo():
    return open_clip_demo()


def test_model_is_a_small_plain_open_clip_model(demo):
    model, tokenizer, _ = demo
    assert type(model) is open_clip.CLIP and not model.training
    assert 1.4e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.6e6
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    image, text, scale = model(torch.zeros(2, 3, 32, 32), tokenizer(["a star", "the letter B", "a red ring"]))
    assert image.shape == (2, 128) and text.shape == (3, 128) and 1 < scale <= 100.1


def test_weights_are_shipped_in_half_precision(demo):
    stored = load_file(WEIGHTS)
    assert {value.dtype for value in stored.values()} == {torch.float16} and WEIGHTS.stat().st_size < 3.5e6
    state = demo.model.state_dict()
    assert stored.keys() == state.keys() and all(
        torch.equal(value.float(), state[name]) for name, value in stored.items()
    )


def test_shipped_file_is_the_one_that_the_metadata_describes(demo):
    metadata = json.loads(WEIGHTS.with_suffix(".json").read_text())
    assert hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() == metadata["sha256"]
    assert metadata["parameters"] == sum(parameter.numel() for parameter in demo.model.parameters())
    assert len(WEIGHTS.with_suffix(".csv").read_text().splitlines()) == metadata["steps"] + 1


def test_loading_leaves_the_callers_random_stream_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    open_clip_demo()
    assert torch.equal(torch.rand(2), expected)


def test_preprocess_agrees_with_the_fast_path(demo):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    one_by_one = torch.stack([demo.preprocess(Image.fromarray(picture)) for picture in pixels])
    assert torch.allclose(normalise(pixels), one_by_one, atol=1e-6)
    assert normalise(pixels).dtype == torch.float32 and normalise(pixels).is_contiguous()
    assert demo.preprocess(Image.new("L", (50, 40))).shape == (3, 32, 32)


def test_words_after_the_end_marker_do_not_matter(demo):
    rows = demo.tokenizer(["a red star"])
    longer = rows.clone()
    longer[0, 6:] = 5
    with torch.no_grad():
        assert torch.allclose(demo.model.encode_text(rows), demo.model.encode_text(longer), atol=1e-5)


def test_missing_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(demo_model, "WEIGHTS", tmp_path / "tiny_clip.safetensors")
    with pytest.raises(RuntimeError, match=r"tiny_clip.safetensors is missing.*Reinstall fastlora, or remake it"):
        open_clip_demo()


def test_damaged_weights(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(WEIGHTS.read_bytes()[:1000])
    with pytest.raises(RuntimeError, match="is not a readable safetensors file"):
        load_weights(build_model(), path)


def test_weights_of_another_architecture(tmp_path):
    path = tmp_path / "weights.safetensors"
    stored = load_file(WEIGHTS)
    stored.pop("logit_scale")
    save_file(stored, path)
    with pytest.raises(RuntimeError, match="logit_scale"):
        load_weights(build_model(), path)
