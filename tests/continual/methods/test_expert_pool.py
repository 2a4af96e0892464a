import pytest
import torch
import torch.nn.functional as F
from continual.task_driver import assert_same_state, check_going_on_after_task_2, state_of, train_tasks

from fastlora.continual import Trainer
from fastlora.continual.config import method_config
from fastlora.continual.expert_pool import Experts, PooledLinear
from fastlora.continual.methods import build_method

FC1 = "visual.transformer.resblocks.0.mlp.c_fc"


def config(**options):
    defaults = {"rank": 6, "active": 2, "iterations": 8, "batch_size": 16, "lr": 1e-2}
    return method_config("expert_pool", **defaults | options)


def pooled(per, rank=6, active=2):
    torch.manual_seed(0)
    plain = torch.nn.Linear(10, 7).requires_grad_(False)
    layer = PooledLinear(plain, Experts(plain, active, per))
    layer.experts.grow(rank, torch.Generator().manual_seed(1))
    with torch.no_grad():
        layer.experts.newest[1].normal_()
    return layer


def gates(layer, x):
    return layer.experts.gates(x, layer.experts.all()[2]).detach()


@pytest.mark.parametrize("per", ["sample", "token"])
def test_exactly_k_experts_are_active(per):
    layer, x = pooled(per), torch.randn(9, 5, 10)
    found, router = gates(layer, x), layer.experts.all()[2]
    assert found.shape == ((9, 6) if per == "sample" else (45, 6))
    assert (found != 0).sum(1).tolist() == [2] * len(found)
    torch.testing.assert_close(found.sum(1), torch.full((len(found),), 2.0))
    rows = x[:, 0] if per == "sample" else x.flatten(0, 1)
    chosen = (rows @ router.t()).topk(2).indices.sort(1).values
    assert torch.equal(found.nonzero()[:, 1].view(-1, 2), chosen)
    assert len(chosen.unique(dim=0)) > 2  # the inputs decide


def test_all_are_active_while_the_pool_has_fewer():
    layer = pooled("token", rank=3, active=8)
    assert (gates(layer, torch.randn(2, 4, 10)) != 0).all()


@pytest.mark.parametrize("per", ["sample", "token"])
def test_output_against_the_sum_as_written(per):
    layer, x = pooled(per), torch.randn(4, 5, 10)
    lora_a, lora_b, router = (tensor.detach() for tensor in layer.experts.all())
    expected = F.linear(x, layer.weight, layer.bias)
    for sample in range(4):
        for token in range(5):
            scores = router @ (x[sample, 0] if per == "sample" else x[sample, token])
            chosen = scores.topk(2).indices
            for i, share in zip(chosen.tolist(), scores[chosen].softmax(0)):
                expected[sample, token] += 2 * share * lora_b[:, i] * (lora_a[i] @ x[sample, token])
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("per", ["sample", "token"])
def test_the_gradient_reaches_the_chosen_experts_alone(per):
    layer, x = pooled(per), torch.randn(1, 1 if per == "token" else 5, 10)
    layer(x).square().sum().backward()
    chosen = (gates(layer, x)[0] != 0).tolist()
    assert sum(chosen) == 2
    lora_a, lora_b, router = layer.experts.newest
    for grad in (lora_a.grad, lora_b.grad.t(), router.grad):
        assert [bool(row.any()) for row in grad] == chosen


def test_a_fresh_pool_changes_nothing(make_clip, tokenizer):
    plain, model = make_clip(), make_clip()
    method = build_method(config())
    method.attach(model)  # without an expert, then with some
    for experts in method.pool.values():
        experts.grow(6, torch.Generator().manual_seed(0))
    assert isinstance(model.get_submodule(FC1), PooledLinear) and len(method.pool) == 4
    assert_same_state(state_of(model), state_of(plain))  # and no key of the pool
    images, tokens = torch.randn(3, 3, 16, 16), tokenizer(["a photo of a red", "green"])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(images), plain.encode_image(images))
        torch.testing.assert_close(model.encode_text(tokens), plain.encode_text(tokens))


def test_the_pool_trains_and_the_weights_do_not(clip, tokenizer, stream):
    before, images = state_of(clip), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        features = clip.encode_image(images)
    record = Trainer(clip, tokenizer, stream, config(iterations=40), progress=False).fit()
    assert_same_state(state_of(clip), before)
    with torch.no_grad():
        assert not torch.allclose(clip.encode_image(images), features, atol=1e-3)  # evaluated with the pool in place
    assert record.metrics()["learning"] > sum(record.own[0]) / 3 + 10
    assert record.drift == [0.0] * 4 and record.mean_rank() == 2.0
    assert all(row.delta_norm > 0 for row in record.ranks if row.task == 1)


def test_experts_of_earlier_tasks_are_frozen(make_clip, tokenizer, make_stream):
    """A task adds its own and trains these alone."""
    model, stream = make_clip(), make_stream()
    before = train_tasks(model, tokenizer, stream, config(), (1, 2)).state_dict()
    fresh = make_clip()
    after = train_tasks(fresh, tokenizer, stream, config(), (3,), before)
    trained = 0
    for key, value in after.state_dict().items():
        dim = 1 if key.endswith("lora_b") else 0
        assert value.shape[dim] == 18
        assert torch.equal(value.narrow(dim, 0, 12), before[key])
        trained += key.endswith("lora_b") and bool(value.narrow(dim, 12, 6).any())
    assert trained


def test_too_many_experts(make_clip, tokenizer, make_stream):
    model, stream = make_clip(), make_stream()
    with pytest.raises(ValueError, match="task 3 brings the pool of a layer to 300 experts; 256 is the most"):
        train_tasks(model, tokenizer, stream, config(rank=100, iterations=1), (1, 2, 3))


@pytest.mark.parametrize("number", [1, 2])
def test_a_task_that_is_cut_short(make_clip, tokenizer, make_stream, number):
    """The model computes what it did before the task; in task 1 it is the plain one again."""
    model, stream = make_clip().requires_grad_(False), make_stream()
    trainer = Trainer(model.train(), tokenizer, stream, config(), progress=False)
    method, images = trainer.method, torch.randn(2, 3, 16, 16)
    if number == 2:
        trainer._train(1, stream.tasks[0])
        method.abandon(model)  # between tasks there is nothing to give up
    with torch.no_grad():
        before = model.encode_image(images)
    method.after_step = lambda ctx: (_ for _ in ()).throw(KeyboardInterrupt) if ctx.step["iteration"] == 3 else None
    with pytest.raises(KeyboardInterrupt):
        trainer._train(number, stream.tasks[number - 1])
    with torch.no_grad():
        assert not torch.equal(model.encode_image(images), before)
        method.abandon(model)
        assert torch.equal(model.encode_image(images), before)
    assert type(model.get_submodule(FC1)) is (torch.nn.Linear if number == 1 else PooledLinear)


def test_a_pool_that_was_saved_gives_the_same_model(make_clip, tokenizer, make_stream):
    model, images = make_clip(), torch.randn(2, 3, 16, 16)
    method = train_tasks(model, tokenizer, make_stream(), config(), (1, 2))
    again, loaded = make_clip(), build_method(config())
    loaded.load_state_dict(method.state_dict())
    loaded.attach(again)
    with torch.no_grad():
        assert torch.equal(again.encode_image(images), model.encode_image(images))


@pytest.mark.parametrize("per", ["sample", "token"])
def test_going_on_after_a_stop(make_clip, tokenizer, make_stream, per):
    state = check_going_on_after_task_2(make_clip, tokenizer, make_stream, config(per=per))
    assert len(state) == 4 * 3 and f"{FC1}.router" in state


def test_bad_options():
    with pytest.raises(ValueError, match="targets hold q, out; a pool chooses its experts when a layer is called"):
        config(targets=("q", "fc1", "out"))
    with pytest.raises(ValueError, match="active is 0; it must be an integer >= 1"):
        config(active=0)
    with pytest.raises(ValueError, match="per is 'tokens'; accepted: sample, token. Did you mean 'token'"):
        config(per="tokens")
    with pytest.raises(ValueError, match="merge_scale is 0.5; a pool is never merged"):
        config(merge_scale=0.5)
