"""What every method of the registry keeps to, whoever wrote it."""

import dataclasses
import inspect
import re
import sys

import pytest
import torch
import yaml

import fastlora
from fastlora.continual.config import CONFIGS, method_config
from fastlora.continual.methods import METHODS
from fastlora.continual.stream import InMemoryImages, Reference, TaskStream
from fastlora.continual.trainer import Trainer

QUICK = {"iterations": 3, "batch_size": 8, "rank": 2, "lr": 1e-3}
TRAINED = [name for name, method in METHODS.items() if method.trains]
POOLED = {"expert_pool"}  # what it learns stays beside the weights: tests/continual/methods/test_expert_pool.py


def options_of(name):
    return {field.name for field in dataclasses.fields(CONFIGS[name])}


def having(*options):
    return [name for name in METHODS if options_of(name) >= set(options) and name not in POOLED]


@pytest.fixture
def make_trainer(make_clip, make_task, tokenizer):
    def make(name, tasks=2, seed=0, **options):
        parts = [make_task(colour, 2 + i, shots=4, seed=i) for i, colour in enumerate(("red", "green", "blue")[:tasks])]
        generator = torch.Generator().manual_seed(9)
        images = InMemoryImages(torch.randn(20, 3, 16, 16, generator=generator), torch.zeros(20, dtype=torch.long))
        reference = Reference(images, tuple(f"a {word} picture" for word in ("grey", "dim", "odd", "old", "new")))
        quick = {key: value for key, value in QUICK.items() if key in options_of(name)}
        config = CONFIGS[name](**quick | options)
        stream = TaskStream("contract", parts, reference=reference)
        return Trainer(make_clip(), tokenizer, stream, config, seed=seed, progress=False)

    return make


def plain_state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(a, b):
    assert list(a) == list(b)
    for key in a:
        assert torch.equal(a[key], b[key]), key


def results(trainer):
    """The weights that each data set is tested with."""
    if not trainer.method.per_dataset:
        return [plain_state(trainer.model)]
    found = []
    for index in range(len(trainer.stream)):
        with trainer.method.evaluation_model(trainer.model, index) as model:
            found.append(plain_state(model))
    return found


def states_after_tasks(trainer):
    """Filled as the trainer goes: weights and the method's state before the first task and after each."""
    states, end_task = [(plain_state(trainer.model), {})], trainer.method.end_task

    def watched(ctx):
        report = end_task(ctx)
        state = {key: value.clone() for key, value in trainer.method.state_dict().items()}
        states.append((plain_state(trainer.model), state))
        return report

    trainer.method.end_task = watched
    return states


@pytest.mark.parametrize("name", [name for name in METHODS if name not in POOLED])
def test_a_plain_model_is_left(name, make_trainer, make_clip):
    trainer = make_trainer(name)
    record = trainer.fit()
    fresh = make_clip()
    assert list(trainer.model.state_dict()) == list(fresh.state_dict())
    assert [type(module) for module in trainer.model.modules()] == [type(module) for module in fresh.modules()]
    assert not list(fastlora.adapters(trainer.model))
    assert all(bool(torch.isfinite(value).all()) for state in results(trainer) for value in state.values())
    assert all(bool(torch.isfinite(value).all()) for value in trainer.method.state_dict().values())
    assert len(record.own) == 3
    assert torch.equal(trainer.model.logit_scale, fresh.logit_scale)


@pytest.mark.parametrize("name", [name for name in TRAINED if name not in POOLED])
def test_same_seed_same_bits_and_another_seed_others(name, make_trainer):
    runs = []
    for seed in (0, 0, 1):
        trainer = make_trainer(name, seed=seed)
        torch.manual_seed(len(runs))  # the caller's generator plays no part
        trainer.fit()
        runs.append(results(trainer))
    for first, second in zip(runs[0], runs[1], strict=True):
        assert_same(first, second)
    assert any(not torch.equal(a[key], b[key]) for a, b in zip(runs[0], runs[2], strict=True) for key in a)


@pytest.mark.parametrize("name", having("rank", "distillation"))
def test_distillation_joins_every_method_with_adapters(name, make_trainer):
    """Its loss changes what is learned, and a task goes on from the weights and the method's state all the same."""
    plain, whole = make_trainer(name), make_trainer(name, distillation=1.0)
    plain.fit()
    states = states_after_tasks(whole)
    whole.fit()
    assert any(
        not torch.equal(a[key], b[key]) for a, b in zip(results(plain), results(whole), strict=True) for key in a
    )
    if whole.method.joint:
        return
    resumed = make_trainer(name, distillation=1.0)
    resumed.model.load_state_dict(states[1][0])
    resumed.method.load_state_dict(states[1][1])
    resumed._train(2, resumed.stream.tasks[1])
    for got, want in zip(results(resumed), results(whole), strict=True):
        assert_same(got, want)


@pytest.mark.parametrize("name", TRAINED)
def test_stopped_in_mid_task_leaves_the_weights_of_the_task_before(name, make_trainer):
    trainer = make_trainer(name)
    states, after_step = states_after_tasks(trainer), trainer.method.after_step

    def stop(ctx):
        after_step(ctx)
        if ctx.number == (1 if trainer.method.joint else 2) and ctx.step["iteration"] == 1:
            raise KeyboardInterrupt

    trainer.method.after_step = stop
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert len(states) == (1 if trainer.method.joint else 2)
    assert_same(plain_state(trainer.model), states[-1][0])
    assert not list(fastlora.adapters(trainer.model))


@pytest.mark.parametrize("name", [name for name in TRAINED if not METHODS[name].joint])
def test_goes_on_after_two_tasks_as_if_never_stopped(name, make_trainer):
    """From the model's weights and the method's state alone, with everything else fresh."""
    whole = make_trainer(name, tasks=3)
    states = states_after_tasks(whole)
    whole.fit()
    resumed = make_trainer(name, tasks=3)
    weights, state = states[2]
    resumed.model.load_state_dict(weights)
    resumed.method.load_state_dict(state)
    resumed._train(3, resumed.stream.tasks[2])
    for got, want in zip(results(resumed), results(whole), strict=True):
        assert_same(got, want)
    assert_same(resumed.method.state_dict(), whole.method.state_dict())


@pytest.mark.parametrize("name", METHODS)
def test_config_round_trip(name):
    quick = {key: value for key, value in QUICK.items() if key in options_of(name)}
    config = CONFIGS[name](**quick)
    assert method_config(**yaml.safe_load(yaml.safe_dump(config.as_dict()))) == config


@pytest.mark.parametrize("name", METHODS)
def test_docstring_names_its_paper(name):
    """By arXiv number, or author and year where it has none; or says that there is no paper."""
    method = METHODS[name]
    text = f"{inspect.getdoc(method)} {sys.modules[method.__module__].__doc__}"
    assert re.search(r"arXiv \d{4}\.\d{4,5}|\(\w+ & \w+ \d{4}\)|[Nn]o paper", text)


@pytest.mark.parametrize("tower", ["vision", "text"])
@pytest.mark.parametrize("name", having("where"))
def test_the_other_tower_is_untouched(name, tower, make_trainer, make_clip):
    trainer, before = make_trainer(name, where=tower), plain_state(make_clip())
    trainer.fit()
    changed = {key for state in results(trainer) for key in state if not torch.equal(state[key], before[key])}
    assert changed and {key.startswith("visual.") for key in changed} == {tower == "vision"}


@pytest.mark.parametrize("name", having("merge_scale"))
def test_merge_scale_changes_what_is_left(name, make_trainer, make_clip):
    """Half of it moves the weights less far."""
    start, moved = plain_state(make_clip()), []
    for scale in (1.0, 0.5):
        trainer = make_trainer(name, merge_scale=scale)
        trainer.fit()
        distances = [(state[key] - start[key]).norm() for state in results(trainer) for key in start]
        moved.append(float(torch.stack(distances).norm()))
    assert 0 < moved[1] < 0.9 * moved[0]
