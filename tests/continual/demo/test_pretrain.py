"""The script that made the weights."""

import csv
import hashlib
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastlora.continual.demo.pretrain import PretrainConfig, contrastive_loss, learning_rate, main, make_batch, train
from fastlora.continual.demo.tokenizer import WordTokenizer


def test_three_steps_write_weights_log_and_metadata(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "new"), "--seed", "1", "--steps", "3", "--batch", "8"]) == 0
    weights = tmp_path / "new" / "tiny_clip.safetensors"
    metadata = json.loads(weights.with_suffix(".json").read_text())
    assert (metadata["seed"], metadata["steps"], metadata["batch"]) == (1, 3, 8)
    assert metadata["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert metadata["versions"]["torch"] == torch.__version__ and 0 <= metadata["held_out"] <= 100
    rows = list(csv.DictReader(weights.with_suffix(".csv").open()))
    assert [row["step"] for row in rows] == ["0", "1", "2"] and all(float(row["loss"]) > 0 for row in rows)
    assert {value.dtype for value in load_file(weights).values()} == {torch.float16}
    assert "held_out" in capsys.readouterr().out


def test_same_seed_same_weights():
    first, again, other = (train(PretrainConfig(seed=seed, steps=2, batch=4)) for seed in (0, 0, 1))
    assert first[1] == again[1] and first[1] != other[1]
    states = [model.state_dict() for model, _ in (first, again)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_equal_captions_are_no_negatives():
    torch.manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(4, 8), dim=1) for _ in range(2))
    text[3] = text[0]
    same = torch.eye(4, dtype=torch.bool)
    plain = contrastive_loss(image, text, torch.tensor(10.0), same)
    same[0, 3] = same[3, 0] = True
    masked = contrastive_loss(image, text, torch.tensor(10.0), same)
    logits = 10 * image @ text.T
    rows = [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 3]]  # what each row is compared with
    by_hand = [-(one[i, i] - one[i, kept].logsumexp(0)) for one in (logits, logits.T) for i, kept in enumerate(rows)]
    assert torch.allclose(masked, torch.stack(by_hand).mean()) and masked < plain


def test_batch_marks_equal_captions():
    images, tokens, same = make_batch(np.random.default_rng(0), 64, WordTokenizer())
    assert images.shape == (64, 3, 32, 32) and tokens.shape == (64, 16)
    expected = [[torch.equal(a, b) for a in tokens] for b in tokens]
    assert same.tolist() == expected and 64 < same.sum() < 64 * 64


def test_learning_rate_warms_up_and_ends_near_zero():
    config = PretrainConfig(steps=1000, warmup=100, lr=1.0)
    rates = [learning_rate(step, config) for step in range(1000)]
    assert rates[0] == 0.01 and rates[99] == rates[100] == 1.0 and max(rates) == 1.0 and rates[-1] < 1e-5
    assert learning_rate(0, PretrainConfig(steps=3, lr=1.0)) == 1.0


@pytest.mark.parametrize(
    ("flag", "text"), [("--steps", "steps is 0"), ("--batch", "batch is 0"), ("--seed", "seed is -1")]
)
def test_bad_settings_exit_with_the_reason(flag, text, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path), flag, text.split()[-1]])
    assert stopped.value.code == 2 and text in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
