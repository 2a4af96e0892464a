import pytest
import torch
from continual.task_driver import check_going_on_after_task_2, train_tasks

import fastlora
from fastlora.continual.config import method_config
from fastlora.continual.methods import TaskContext, build_method


def config(**options):
    return method_config("o_lora", **{"rank": 3, "iterations": 15, "batch_size": 16, "lr": 1e-2} | options)


def overlap(method, before):
    """Mean |cosine| between the rows of lora_a of the last task and those of the earlier ones."""
    unit = torch.nn.functional.normalize
    cosines = [
        (unit(before[name]) @ unit(lora_a[len(before[name]) :]).t()).abs().mean()
        for name, lora_a in method.state_dict().items()
    ]
    return float(torch.stack(cosines).mean())


def test_a_large_penalty_makes_the_tasks_orthogonal(make_clip, tokenizer, make_stream):
    overlaps = {}
    for penalty in (0.0, 100.0):
        model, stream = make_clip(), make_stream()
        settings = config(penalty=penalty, iterations=60)
        first = train_tasks(model, tokenizer, stream, settings, (1,))
        before = first.state_dict()
        second = train_tasks(model, tokenizer, stream, settings, (2,), before)
        overlaps[penalty] = overlap(second, before)
    assert overlaps[0.0] > 0.1 and overlaps[100.0] < 0.02


def test_the_penalty_and_its_gradient_against_plain_pytorch(clip, tokenizer, stream):
    method = build_method(config(penalty=0.7))
    ctx = TaskContext(clip, stream.tasks[0], 1, seed=0, seen_classes=0)
    method.begin_task(ctx)
    assert method.extra_loss(ctx) is None  # nothing came before
    torch.manual_seed(0)
    adapters = dict(fastlora.adapters(clip))
    old = {name: torch.randn(5, adapter.in_features) for name, adapter in adapters.items()}
    method.load_state_dict(old)
    method.extra_loss(ctx).backward()

    total = 0.0
    for name, adapter in adapters.items():
        lora_a = adapter.lora_a.detach().double().requires_grad_()
        loss = 0.7 * sum((row * other).sum().abs() for row in lora_a for other in old[name].double())
        loss.backward()
        total += float(loss.detach())
        torch.testing.assert_close(adapter.lora_a.grad.double(), lora_a.grad, rtol=1e-4, atol=1e-5)
        assert adapter.lora_b.grad is None
    assert float(method.extra_loss(ctx).detach()) == pytest.approx(total, rel=1e-5)


def test_memory_holds_every_task_and_is_left_alone(make_clip, tokenizer, make_stream):
    model, stream = make_clip(), make_stream()
    method = train_tasks(model, tokenizer, stream, config(), (1,))
    first = {name: lora_a.clone() for name, lora_a in method.state_dict().items()}
    method = train_tasks(model, tokenizer, stream, config(), (2, 3), first)
    for name, lora_a in method.state_dict().items():
        assert lora_a.shape == (9, first[name].shape[1])
        assert torch.equal(lora_a[:3], first[name])


def test_without_a_penalty_it_is_lora(make_clip, tokenizer, make_stream):
    models = [make_clip(), make_clip()]
    lora = method_config("lora", rank=3, iterations=15, batch_size=16, lr=1e-2)
    for model, settings in zip(models, (config(penalty=0.0), lora)):
        train_tasks(model, tokenizer, make_stream(), settings, (1, 2))
    for a, b in zip(*(model.state_dict().values() for model in models)):
        assert torch.equal(a, b)


def test_going_on_after_a_stop(make_clip, tokenizer, make_stream):
    state = check_going_on_after_task_2(make_clip, tokenizer, make_stream, config())
    assert len(state) == 12
