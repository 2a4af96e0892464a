import math

import pytest
import torch
from continual.task_driver import check_going_on_after_task_2, state_of, train_tasks

import fastlora
from fastlora.continual.batches import gather
from fastlora.continual.config import method_config
from fastlora.continual.layer_inputs import input_moments
from fastlora.continual.methods import TaskContext
from fastlora.continual.methods.inflora import design, extend


def config(**options):
    return method_config("inflora", **{"rank": 3, "iterations": 10, "batch_size": 16, "lr": 1e-2} | options)


def context(model, tokenizer, stream, number):
    """What the hooks of a task see, without a trainer."""
    task, train = stream.tasks[number - 1], stream.open_task(number - 1)
    return TaskContext(model, task, number, seed=0, seen_classes=0, train=train, tokenizer=tokenizer)


def inputs_of_low_rank(rows, rank, width=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, rank, generator=generator) @ torch.randn(rank, width, generator=generator)


def test_design_is_the_top_directions_of_what_is_off_the_old_subspace():
    old, new = inputs_of_low_rank(50, 4), inputs_of_low_rank(60, 7, seed=1)
    basis = extend(torch.zeros(24, 0), old.t() @ old, 1.0)
    assert basis.shape == (24, 4)
    rows = design(new.t() @ new, basis, 3)
    off = new.double() @ (torch.eye(24).double() - basis.double() @ basis.double().t())
    expected = torch.linalg.svd(off)[2][:3]
    torch.testing.assert_close((rows @ expected.t()).abs(), torch.eye(3).double(), atol=1e-4, rtol=0)
    assert float((rows @ basis.double()).abs().max()) < 1e-6
    assert float((old.double() @ rows.t()).norm() / old.norm()) < 1e-5  # old inputs: A x = 0


def test_design_takes_no_old_direction_where_too_few_are_left():
    old = inputs_of_low_rank(50, 4)
    new = torch.cat([old, inputs_of_low_rank(50, 2, seed=3)])
    rows = design(new.t() @ new, extend(torch.zeros(24, 0), old.t() @ old, 1.0), 5)
    assert len(rows) == 2
    assert len(design(old.t() @ old, torch.eye(24), 5)) == 0


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 1.0])
def test_memory_holds_the_share_with_the_fewest_directions(share):
    """Of both tasks, the second after the first; orthonormal, and the first directions stay where they were."""
    generator = torch.Generator().manual_seed(5)
    first, second = (
        torch.randn(200, 24, generator=generator) * torch.logspace(0, -2, 24)[torch.randperm(24, generator=generator)]
        for _ in range(2)
    )
    basis = extend(torch.zeros(24, 0), first.t() @ first, share)
    values = torch.linalg.svdvals(first.double()).square()
    fewest = int((values.cumsum(0) < share * values.sum() * (1 - 1e-9)).sum()) + 1
    assert basis.shape[1] == fewest
    grown = extend(basis, second.t() @ second, share)
    for inputs in (first, second):
        assert float((inputs @ grown).square().sum() / inputs.square().sum()) >= share - 1e-5
    if grown.shape[1] > basis.shape[1]:
        fewer = grown[:, :-1]
        assert float((second @ fewer).square().sum() / second.square().sum()) < share
    torch.testing.assert_close(grown.t() @ grown, torch.eye(grown.shape[1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(grown @ (grown.t() @ basis), basis, atol=1e-5, rtol=0)
    assert torch.equal(extend(grown, second.t() @ second, share), grown)


def test_input_moments_against_the_inputs_themselves(clip, tokenizer, stream):
    """Seen by hand: of a feed-forward layer in the vision tower, of an attention in the text tower."""
    ctx = context(clip, tokenizer, stream, 1)
    seen = {"visual.transformer.resblocks.0.mlp.c_proj": [], "transformer.resblocks.0.attn": []}
    for name, rows in seen.items():
        clip.get_submodule(name).register_forward_pre_hook(lambda m, args, rows=rows: rows.append(args[0].detach()))
    images, _ = gather(ctx.train, torch.arange(len(ctx.train)))
    with torch.no_grad():
        clip.encode_image(images)
        clip.encode_text(tokenizer([ctx.task.templates[0].format(name) for name in ctx.task.classes]))
    fastlora.inject(clip, 2)
    clip.train()
    modes = []
    clip.visual.transformer.resblocks[0].mlp.c_fc.register_forward_pre_hook(lambda m, args: modes.append(m.training))
    moments = input_moments(ctx, batch_size=5)
    assert clip.training and len(modes) == 5 and not any(modes)  # 24 images by 5, without dropout
    assert len(moments) == 2 * 4  # q, k and v share one
    (rows,) = seen["visual.transformer.resblocks.0.mlp.c_proj"]
    rows = rows.flatten(0, 1)
    expected = rows.t() @ rows
    torch.testing.assert_close(moments["visual.transformer.resblocks.0.mlp.c_proj"], expected, rtol=1e-3, atol=1e-3)
    length = 1 + max(len(ctx.task.templates[0].format(name).split()) for name in ctx.task.classes)
    rows = seen["transformer.resblocks.0.attn"][0][:, :length].flatten(0, 1)
    expected = rows.t() @ rows
    torch.testing.assert_close(moments["transformer.resblocks.0.attn"], expected, rtol=1e-3, atol=1e-3)


def test_lora_a_is_orthogonal_to_the_old_inputs_and_frozen(make_clip, tokenizer, make_stream):
    """Of the energy of the first task's inputs at most 1 - energy reaches A, where random rows would let 3 of 32 through."""
    model, stream = make_clip(), make_stream()
    method = train_tasks(model, tokenizer, stream, config(energy=0.99), (1,))
    bases = method.state_dict()

    first = make_stream()
    old_ctx = context(model, tokenizer, first, 1)
    fastlora.inject(model, 1)
    old_moments = input_moments(old_ctx, 16)
    fastlora.remove(model)

    ctx = context(model, tokenizer, stream, 2)
    method.begin_task(ctx)
    for name, adapter in fastlora.adapters(model):
        host = name.rpartition(".")[0] if name.endswith((".q", ".k", ".v")) else name
        rows = adapter.lora_a.detach()
        assert not adapter.lora_a.requires_grad and not adapter.gate.requires_grad and adapter.lora_b.requires_grad
        assert float((rows @ bases[host]).abs().max()) < 1e-6
        gram = 3 * rows @ rows.t()
        torch.testing.assert_close(gram, torch.eye(len(rows)), atol=1e-5, rtol=0)
        moment = old_moments[host]
        assert float((3 * rows @ moment @ rows.t()).trace() / moment.trace()) < 0.011
    designed = {name: adapter.lora_a.clone() for name, adapter in fastlora.adapters(model)}
    ctx.model.train()
    features = ctx.model.encode_image(ctx.train.images)
    features.square().sum().backward()
    ctx.optimizer.step()
    for name, adapter in fastlora.adapters(model):
        assert torch.equal(adapter.lora_a, designed[name])
        assert bool(adapter.lora_b.any()) == name.startswith("visual.")


def test_old_inputs_keep_their_outputs(make_clip, tokenizer, make_stream):
    """The first layer, whose inputs no adapter changes: task 2 moves its outputs on task 1 far less than on task 2."""
    model, stream = make_clip(), make_stream()
    settings = config(energy=0.999, energy_step=0.0, targets=("fc1",), where="vision", iterations=20)
    method = train_tasks(model, tokenizer, stream, settings, (1,))
    weight = model.visual.transformer.resblocks[0].mlp.c_fc.weight
    before = weight.detach().clone()
    moments = {}
    for number in (1, 2):
        ctx = context(model, tokenizer, make_stream(), number)
        fastlora.inject(model, 1, targets=("fc1",), where="vision")
        (moments[number],) = input_moments(ctx, 16).values()
        fastlora.remove(model)
    train_tasks(model, tokenizer, stream, settings, (2,), method.state_dict())
    change = weight.detach() - before
    moved = {n: math.sqrt(float((change @ m @ change.t()).trace() / m.trace())) for n, m in moments.items()}
    assert moved[1] < 0.2 * moved[2]


def test_thresholds_grow_by_the_step(make_clip, tokenizer, make_stream):
    sizes = {}
    for step in (0.0, 0.04):
        method = train_tasks(make_clip(), tokenizer, make_stream(), config(energy=0.9, energy_step=step), (1, 2))
        sizes[step] = sum(basis.shape[1] for basis in method.state_dict().values())
    assert sizes[0.04] > sizes[0.0]


def test_a_full_memory_leaves_nothing_to_learn(make_clip, tokenizer, make_stream):
    model, stream = make_clip(), make_stream()
    full = {host: torch.eye(width) for host, width in widths(make_clip()).items()}
    before = state_of(model)
    train_tasks(model, tokenizer, stream, config(), (2,), full)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def widths(model):
    fastlora.inject(model, 1)
    return {
        name.rpartition(".")[0] if name.endswith((".q", ".k", ".v")) else name: adapter.in_features
        for name, adapter in fastlora.adapters(model)
    }


def test_going_on_after_a_stop(make_clip, tokenizer, make_stream):
    state = check_going_on_after_task_2(make_clip, tokenizer, make_stream, config())
    assert len(state) == 8 and all(value.dtype == torch.float32 for value in state.values())
