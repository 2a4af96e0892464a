"""Estimates of a model that is not built, against the same model built."""

import json
import re

import open_clip
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastlora
from fastlora.cli import main
from fastlora.continual.estimate import GPUS, Wanted, estimate, rate_here, text
from fastlora.continual.features import image_features, text_features
from fastlora.continual.losses import contrastive_loss
from fastlora.continual.memory import saved_bytes

CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 100, "width": 48, "heads": 2, "layers": 3},
}


@pytest.fixture
def described(tmp_path):
    path = tmp_path / "estimated.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def test_counts_are_those_of_the_model_itself(described):
    wanted = Wanted(described, rank=3, images=6, classes=5, prompt_tokens=9)
    found = estimate(wanted)
    model = open_clip.model.CLIP(**CONFIG).requires_grad_(False)
    weights = sum(value.nbytes for value in model.state_dict().values())
    fastlora.inject(model, rank=3)
    images, tokens = torch.randn(6, 3, 32, 32), torch.randint(1, 99, (5, 9))
    with FlopCounterMode(display=False) as counter:
        features = image_features(model, images), text_features(model, tokens)
        contrastive_loss(*features, torch.zeros(6, dtype=torch.long), model.logit_scale.detach().exp()).backward()
    assert found.operations == counter.get_total_flops()
    assert found.memory["kept for backward"] == saved_bytes(model, images, tokens)
    assert found.memory["weights"] == weights
    adapters = sum(p.nbytes for p in fastlora.adapter_parameters(model))
    assert [found.memory[what] for what in ("adapters", "their gradients", "optimizer")] == [
        adapters,
        adapters,
        2 * adapters,
    ]
    assert found.product == (6 * 17, 64, 256)


def test_options_save_memory_at_the_price_they_have(described):
    whole, parts, less, half = (
        estimate(Wanted(described, **options))
        for options in ({}, {"accumulate": 4}, {"activation_checkpointing": True}, {"dtype": "bfloat16"})
    )
    for saving in (parts, less, half):
        assert saving.memory["kept for backward"] < 0.75 * whole.memory["kept for backward"]
    assert parts.operations > whole.operations < less.operations and half.operations == whole.operations
    assert half.memory["weights in the dtype of the step"] == half.memory["weights"] // 2
    assert whole.memory["weights in the dtype of the step"] == 0


def test_a_model_of_two_billion_parameters_takes_no_memory_to_estimate():
    found = estimate(Wanted("ViT-bigG-14", dtype="bfloat16"))
    assert found.memory["weights"] > 9e9 and found.operations > 1e14


def test_command(described, capsys):
    assert main(["doctor", "--estimate", described, "--images", "8", "--dtype", "bfloat16"]) == 0
    told = capsys.readouterr().out
    assert "estimated.json, a training step: rank 16, images 8, classes 100" in told and "measured now" in told
    assert told.count("from the data sheet, not measured") == len(GPUS) and "kept for backward" in told


def test_what_does_not_fit_is_told():
    wanted = Wanted("ViT-bigG-14", images=2048)
    assert "RTX 4090" in text(wanted, found := estimate(wanted)) and found.memory["kept for backward"] > 24e9
    assert "does not fit into 24 x 10^9 bytes" in text(wanted, found) and "here" not in text(wanted, found)


def test_rate_is_in_operations_a_second():
    assert 1e8 < rate_here((256, 64, 256), torch.float32, seconds=0.01) < 1e15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ViT-B-99"], "model is 'ViT-B-99', which is none of open_clip's .*near: ViT-B"),
        (["RN50"], "RN50 has a tower that is no transformer of open_clip's own"),
        (["ViT-B-16", "--rank", "0"], "rank is 0; it must be an integer >= 1"),
        (["ViT-B-16", "--dtype", "half"], "dtype is 'half'; accepted: float32, bfloat16, float16"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    assert main(["doctor", "--estimate", *arguments]) != 0
    assert re.search(message, capsys.readouterr().err)
