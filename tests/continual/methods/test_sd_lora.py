import pytest
import torch
from continual.task_driver import assert_same_state, check_going_on_after_task_2, state_of, train_tasks

import fastlora
from fastlora import FusedRankLoRALinear
from fastlora.continual import Trainer
from fastlora.continual.config import method_config
from fastlora.continual.methods.sd_lora import tie_gates
from fastlora.continual.restore import restore
from fastlora.continual.saved_run import read_run

BASE = "visual.transformer.resblocks.0.mlp.c_fc"


def config(**options):
    return method_config("sd_lora", **{"rank": 3, "iterations": 8, "batch_size": 16, "lr": 1e-2} | options)


def test_magnitudes_and_their_gradient_against_plain_pytorch():
    """Three blocks of two: d loss / d alpha from the equation as written, with one alpha a block."""
    torch.manual_seed(0)
    layer = FusedRankLoRALinear(10, 7, 6, gate_init="ones")
    with torch.no_grad():
        layer.lora_b.normal_()
        layer.gate.copy_(torch.tensor([0.5, -2.0, 1.5]).repeat_interleave(2))
    tie_gates(layer, 2)
    x, y = torch.randn(5, 4, 10), torch.randn(5, 4, 7)
    (layer(x) - y).square().sum().backward()

    alpha = torch.tensor([0.5, -2.0, 1.5], dtype=torch.float64, requires_grad=True)
    a, b = (t.detach().double() for t in (layer.lora_a, layer.lora_b))
    weight = layer.weight.double() + sum(alpha[k] * b[:, 2 * k : 2 * k + 2] @ a[2 * k : 2 * k + 2] for k in range(3))
    (x.double() @ weight.t() + layer.bias.double() - y).square().sum().backward()
    torch.testing.assert_close(layer.gate.grad.double(), alpha.grad.repeat_interleave(2), rtol=1e-5, atol=1e-5)


def test_tied_magnitudes_stay_tied_and_old_directions_stay_frozen(make_clip, tokenizer, make_stream):
    """To the last bit, over a whole task; every magnitude moves, and so does the new direction."""
    model, stream = make_clip(), make_stream()
    method = train_tasks(model, tokenizer, stream, config(), (1, 2))
    old = {name: (layer.lora_a, layer.lora_b, layer.gate) for name, layer in method.layers.items()}
    after = train_tasks(model, tokenizer, stream, config(), (3,), method.state_dict())
    for name, layer in after.layers.items():
        lora_a, lora_b, gate = old[name]
        blocks = layer.gate.view(3, 3)
        assert torch.equal(blocks, blocks[:, :1].expand(3, 3))
        assert torch.equal(layer.lora_a[:6], lora_a) and torch.equal(layer.lora_b[:, :6], lora_b)
        assert not torch.equal(layer.gate[:6], gate)
        for k in range(3):
            block = slice(3 * k, 3 * k + 3)
            norm = (layer.lora_b[:, block] @ layer.lora_a[block]).norm()
            assert float(norm) == pytest.approx(1.0, abs=1e-4)


def test_magnitudes_take_a_learning_rate_of_their_own(make_clip, tokenizer, make_stream):
    """Adam's first step moves a magnitude by its rate, a direction by lr."""
    moved = []
    for rate in (None, 0.2):
        model, stream, options = make_clip(), make_stream(), config(iterations=1, magnitude_lr=rate)
        before = train_tasks(model, tokenizer, stream, options, (1, 2))
        after = train_tasks(model, tokenizer, stream, options, (3,), before.state_dict())
        moved.append([(after.layers[name].gate[:6] - layer.gate).abs().max() for name, layer in before.layers.items()])
    assert max(moved[0]) == pytest.approx(0.01, rel=0.05) and max(moved[1]) == pytest.approx(0.2, rel=0.05)


def test_the_model_is_the_base_plus_every_direction_times_its_magnitude(make_clip, tokenizer, make_stream):
    model, stream = make_clip(), make_stream()
    start = model.get_submodule(BASE).weight.detach().clone()
    state = None
    for number, scale in ((1, 1.0), (2, 0.5), (3, 0.5)):  # the share that is merged is what the next task starts from
        method = train_tasks(model, tokenizer, stream, config(merge_scale=scale), (number,), state)
        state = method.state_dict()
        layer = method.layers[BASE]
        assert torch.equal(layer.base, start)  # bit for bit, after any number of tasks
        expected = layer.base + (layer.lora_b * layer.gate) @ layer.lora_a
        torch.testing.assert_close(model.get_submodule(BASE).weight.detach(), expected, rtol=1e-4, atol=1e-5)


def test_a_task_begins_where_the_last_one_ended(make_clip, tokenizer, make_stream):
    """Taking the directions out of the weights and putting them into the adapter changes no output."""
    model, stream = make_clip(), make_stream()
    method = train_tasks(model, tokenizer, stream, config(), (1, 2))
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        before = model.encode_image(images)
    trainer = Trainer(model, tokenizer, stream, config(), progress=False)
    ctx = trainer._context(3, stream.tasks[2], stream.open_task(2))
    merged = state_of(model)
    method.begin_task(ctx)
    adapter = dict(fastlora.adapters(model))[BASE]
    assert torch.equal(adapter.weight, method.layers[BASE].base) and adapter.gate.numel() == 9
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(images), before, rtol=1e-4, atol=1e-5)
    method.abandon(model)
    assert_same_state(state_of(model), merged)


@pytest.mark.parametrize("number", [1, 2])
def test_what_was_trained_is_what_is_merged(make_clip, tokenizer, make_stream, number):
    """Normalising the new direction and going over to an increment changes no output."""
    model, stream, images = make_clip(), make_stream(), torch.randn(4, 3, 16, 16)
    trainer = Trainer(model, tokenizer, stream, config(), progress=False)
    trained, end = [], trainer.method.end_task

    def watched(ctx):
        with torch.no_grad():
            trained.append(model.encode_image(images))
        return end(ctx)

    trainer.method.end_task = watched
    for task in range(1, number + 1):
        trainer._train(task, stream.tasks[task - 1])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(images), trained[-1], rtol=1e-4, atol=1e-5)


def test_the_journal_rebuilds_the_model_after_any_task(make_clip, tokenizer, stream, tmp_path):
    out = tmp_path / "run"
    Trainer(make_clip(), tokenizer, stream, config(), out=out, progress=False, checkpoints="all").fit()
    run = read_run(out)
    assert [sorted({row.active_rank for row in run.record.ranks if row.task == n}) for n in (1, 2, 3)] == [
        [3],
        [6],
        [9],
    ]
    for task in (2, 3):
        model, rebuilt = make_clip(), make_clip()
        restore(model, run, task)
        (out / "checkpoints" / f"task_0{task}.safetensors").unlink()
        assert restore(rebuilt, run, task) == f"{task} adapter files"
        assert_same_state(state_of(rebuilt), state_of(model))


def test_too_many_components(make_clip, tokenizer, make_stream):
    model, stream = make_clip(), make_stream()
    settings = config(rank=100, iterations=2)
    method = train_tasks(model, tokenizer, stream, settings, (1, 2))
    with pytest.raises(ValueError, match="task 3 brings the rank of a layer to 300; sd_lora keeps .* 256 together"):
        train_tasks(model, tokenizer, stream, settings, (3,), method.state_dict())


def test_going_on_after_a_stop(make_clip, tokenizer, make_stream):
    state = check_going_on_after_task_2(make_clip, tokenizer, make_stream, config())
    assert len(state) == 12 * 4 and state[f"{BASE}.lora_a"].shape == (6, 32)
