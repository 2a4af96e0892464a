import pytest
import torch
from continual.task_driver import assert_same_state, check_going_on_after_task_2, state_of

import fastlora
from fastlora.continual import Trainer
from fastlora.continual.config import method_config


def config(**options):
    defaults = {"rank": 6, "iterations": 6, "batch_size": 16, "lr": 1e-2, "reference_iterations": 4}
    return method_config("pearl", **defaults | options)


def prepared(model, tokenizer, stream, **options):
    """Method and context of the first task."""
    trainer = Trainer(model, tokenizer, stream, config(**options), progress=False)
    return trainer.method, trainer._context(1, stream.tasks[0], stream.open_task(0))


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_planned_rank_is_the_smallest_that_holds_the_energy(make_clip, tokenizer, make_stream, energy):
    model = make_clip()
    method, ctx = prepared(model, tokenizer, make_stream(), energy=energy, rank=32)
    fastlora.inject(model, 1)
    names = [name for name, _ in fastlora.adapters(model)]
    fastlora.remove(model)
    taus = method.task_vectors(ctx, names)
    method.begin_task(ctx)
    ranks = {name: adapter.gate.numel() for name, adapter in fastlora.adapters(model)}
    assert len(set(ranks.values())) > 1
    for name, tau in taus.items():
        values = torch.linalg.svdvals(tau.double()).square()
        assert values[: ranks[name]].sum() >= energy * values.sum() * (1 - 1e-9)
        assert values[: ranks[name] - 1].sum() < energy * values.sum()


def test_rank_bounds_the_plan(clip, tokenizer, stream):
    method, ctx = prepared(clip, tokenizer, stream, energy=1.0, rank=5)
    method.begin_task(ctx)
    assert {adapter.gate.numel() for _, adapter in fastlora.adapters(clip)} == {5}
    assert method.planned_rank(torch.zeros(4, 4)) == 1


def test_task_vectors_against_one_step_of_plain_pytorch(make_clip, tokenizer, make_stream):
    """One step: tau is minus the gradient, clipped to norm 1 over all adapted matrices, times the step length."""
    from fastlora.continual.batches import batches
    from fastlora.continual.losses import contrastive_loss

    model, twin = make_clip(), make_clip()
    method, ctx = prepared(model, tokenizer, make_stream(), reference_iterations=1, reference_lr=0.01)
    block = "visual.transformer.resblocks.0"
    taus = method.task_vectors(ctx, [f"{block}.attn.k", f"{block}.mlp.c_proj"])

    weights = [twin.get_parameter(f"{block}.attn.in_proj_weight"), twin.get_parameter(f"{block}.mlp.c_proj.weight")]
    images, labels = next(batches(ctx.train, 16, ctx.seed, 1))
    texts = twin.encode_text(tokenizer([ctx.task.templates[0].format(name) for name in ctx.task.classes]), True)
    scale = twin.logit_scale.detach().exp()
    contrastive_loss(twin.encode_image(images, True), texts, labels, scale).backward()
    norm = torch.cat([weight.grad.flatten() for weight in weights]).norm()
    assert norm > 1
    expected = [-0.01 * weight.grad / norm for weight in weights]
    torch.testing.assert_close(taus[f"{block}.attn.k"], expected[0].chunk(3)[1], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(taus[f"{block}.mlp.c_proj"], expected[1], rtol=1e-3, atol=1e-6)


def test_the_brief_fine_tuning_leaves_nothing_behind(clip, tokenizer, stream):
    before = state_of(clip)
    clip.eval()
    method, ctx = prepared(clip, tokenizer, stream)
    method.inject(ctx)
    assert not clip.training
    fastlora.remove(clip)
    assert_same_state(state_of(clip), before)
    assert not any(p.requires_grad or p.grad is not None for p in clip.parameters())


def test_interrupted_in_the_brief_fine_tuning(clip, tokenizer, stream, monkeypatch):
    from fastlora.continual.methods import pearl

    calls = []

    def stop_at_third(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    original = pearl.contrastive_loss
    monkeypatch.setattr(pearl, "contrastive_loss", stop_at_third)
    before = state_of(clip)
    with pytest.raises(KeyboardInterrupt):
        Trainer(clip, tokenizer, stream, config(), progress=False).fit()
    assert_same_state(state_of(clip), before)
    assert not list(fastlora.adapters(clip))


def test_images_that_are_not_finite(clip, tokenizer, stream):
    stream._train[0].images[:] = float("nan")
    before = state_of(clip)
    with pytest.raises(FloatingPointError, match="fine-tuning on 'red' is not finite.* Lower reference_lr"):
        Trainer(clip, tokenizer, stream, config(), progress=False).fit()
    assert_same_state(state_of(clip), before)


def test_ranks_are_recorded_and_journaled(clip, tokenizer, stream, tmp_path):
    record = Trainer(clip, tokenizer, stream, config(energy=0.8), out=tmp_path / "run", progress=False).fit()
    ranks = [{row.module: row.active_rank for row in record.ranks if row.task == task} for task in (1, 2, 3)]
    assert ranks == [entry.ranks for entry in fastlora.Journal(tmp_path / "run" / "adapters")]
    assert len(set(ranks[0].values())) > 1


def test_going_on_after_a_stop(make_clip, tokenizer, make_stream):
    assert check_going_on_after_task_2(make_clip, tokenizer, make_stream, config()) == {}
