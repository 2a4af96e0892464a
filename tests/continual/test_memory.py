"""Memory of a step, counted on fake tensors: what autograd keeps of real ones, and what the options make of it."""

import pytest
import torch

import fastlora
from fastlora.continual import LoRAConfig, Trainer
from fastlora.continual.features import image_features, text_features
from fastlora.continual.losses import contrastive_loss
from fastlora.continual.memory import saved_bytes
from fastlora.continual.step import TrainingStep

LORA = LoRAConfig(rank=2, iterations=2, batch_size=16)


def needs(make_clip, tokenizer, make_stream, **options):
    return Trainer(make_clip(layers=3), tokenizer, make_stream(), LORA, progress=False, **options).plan()


@pytest.mark.parametrize("adapted", [False, True])
def test_what_backward_needs_is_counted_without_computing(make_clip, adapted):
    """On fake tensors the very bytes that autograd keeps of real ones."""
    model = make_clip().train()
    if adapted:
        fastlora.inject(model, rank=4)
    images, tokens = torch.randn(8, 3, 16, 16), torch.randint(1, 50, (5, 9))
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}

    def pack(tensor):
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = image_features(model, images), text_features(model, tokens)
        contrastive_loss(*features, torch.zeros(8, dtype=torch.long), model.logit_scale.detach().exp())
    expected = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights)
    assert saved_bytes(model, images, tokens) == expected > 100_000


def test_checkpointing_keeps_inputs_and_one_block(make_clip):
    """Three equal blocks in each tower; blocks of the images' tower keep more, and one of them is whole at a time."""
    images, tokens = torch.randn(8, 3, 16, 16), torch.randint(1, 50, (5, 9))
    kept = []
    for layers in (3, 4):
        model = make_clip(layers=layers)
        fastlora.inject(model, rank=4)
        kept.append([saved_bytes(model, images, tokens, checkpointing) for checkpointing in (False, True)])
    inputs = 4 * 32 * (8 * 5 + 5 * 9)  # float32, width 32: five tokens an image, nine a text
    assert kept[1][1] - kept[0][1] == inputs, "a layer more costs its two inputs"
    assert kept[1][0] - kept[0][0] > 5 * inputs and kept[0][1] < kept[0][0]


def test_options_of_the_step_are_in_the_plan(make_clip, tokenizer, make_stream):
    whole = needs(make_clip, tokenizer, make_stream)
    parts = needs(make_clip, tokenizer, make_stream, accumulate=4).needs
    half = needs(make_clip, tokenizer, make_stream, dtype="bfloat16").needs
    less = needs(make_clip, tokenizer, make_stream, activation_checkpointing=True).needs
    activations = whole.needs.activations
    assert max(parts.activations, less.activations) < 0.7 * activations
    assert 0.45 * activations < half.activations < 0.75 * activations
    assert 0.45 * whole.weights < half.rounded < 0.55 * whole.weights and whole.needs.rounded == 0


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_running_out_of_memory_names_the_largest_consumers(clip, tokenizer, stream, monkeypatch, tmp_path, device):
    def runs_out(self, iteration, batch):
        if device == "cpu":
            torch.empty(1 << 60, dtype=torch.uint8)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(TrainingStep, "__call__", runs_out)
    trainer = Trainer(clip, tokenizer, stream, LORA, progress=False, out=tmp_path / "run")
    before = {key: value.clone() for key, value in clip.state_dict().items()}
    message = (
        r"memory of cpu ran out on 16 images a step. Training takes about \d+ MiB, most of it: kept for backward, "
        r"largest step \d+ MiB, weights \d+ MiB, .*--accumulate 4, --activation_checkpointing true, --dtype bfloat16"
    )
    with pytest.raises(RuntimeError, match=message):
        trainer.fit()
    assert all(torch.equal(value, before[key]) for key, value in clip.state_dict().items())
