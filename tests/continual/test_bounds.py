"""Joint training and one adapter per task: the bounds, and that their runs can be read back."""

import pytest
import torch

import fastlora
from fastlora.continual.config import FullConfig, JointConfig, LoRAConfig, PerTaskConfig
from fastlora.continual.evaluation import evaluate
from fastlora.continual.plots import training_curves
from fastlora.continual.restore import method_of, restore
from fastlora.continual.saved_run import read_run
from fastlora.continual.stream import TaskStream
from fastlora.continual.trainer import Trainer

QUICK = {"iterations": 6, "batch_size": 8, "lr": 1e-2}
ADAPTERS = QUICK | {"rank": 2}


@pytest.fixture
def make_trainer(make_clip, make_task, tokenizer):
    def make(config, tasks=3, **options):
        parts = [make_task(colour, 2 + i, shots=4, seed=i) for i, colour in enumerate(("red", "green", "blue")[:tasks])]
        stream = TaskStream("bounds", parts, held_out=make_task("grey", 5, seed=9))
        return Trainer(make_clip(), tokenizer, stream, config, progress=False, **options)

    return make


def plain_state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def fitted(trainer):
    trainer.fit()
    return plain_state(trainer.model)


# ---- joint


@pytest.mark.parametrize(
    ("train", "alone"), [("adapters", LoRAConfig(**ADAPTERS)), ("weights", FullConfig(**QUICK))], ids=["lora", "full"]
)
def test_joint_training_of_one_task_is_that_task_s_training(train, alone, make_trainer):
    joint = fitted(make_trainer(JointConfig(**ADAPTERS, train=train), tasks=1))
    assert_same(joint, fitted(make_trainer(alone, tasks=1)))


@pytest.mark.parametrize("train", ["adapters", "weights"])
def test_joint_takes_a_batch_of_each_task_in_turn(train, make_trainer):
    trainer, classes, numbers = make_trainer(JointConfig(**ADAPTERS, train=train)), [], []
    after_step = trainer.method.after_step

    def watched(ctx):
        classes.append(len(ctx.step["text_features"]))
        numbers.append(ctx.number)
        after_step(ctx)

    trainer.method.after_step = watched
    record = trainer.fit()
    assert classes == [2, 3, 4] * 6 and set(numbers) == {1}
    assert record.own[1] == record.own[2] == record.own[3] != record.own[0]


def test_joint_learns_every_task(make_trainer):
    record = make_trainer(JointConfig(**ADAPTERS | {"iterations": 30})).fit()
    gains = [after - before for after, before in zip(record.own[3], record.own[0])]
    assert min(gains) > 5 and sum(gains) > 60


@pytest.mark.parametrize("checkpoints", ["last", "none"])
def test_a_run_of_joint_adapters_is_restored_after_every_task(checkpoints, make_trainer, make_clip, tmp_path):
    after = fitted(make_trainer(JointConfig(**ADAPTERS), out=tmp_path / "run", checkpoints=checkpoints))
    run = read_run(tmp_path / "run")
    assert [entry.name for entry in fastlora.Journal(run.path / "adapters")] == ["all tasks"]
    assert len(training_curves(run).axes) == 3 and run.stages == ["all tasks"]
    assert run.log[-1]["iteration"] == 3 * 6 - 1
    for task in (1, 2, 3):
        model = make_clip()
        restore(model, run, task)
        assert_same(plain_state(model), after)


def test_a_run_of_joint_weights_keeps_them(make_trainer, make_clip, tmp_path):
    """As a checkpoint; without one in the commit point, where those after the last training are."""
    after = fitted(make_trainer(JointConfig(**ADAPTERS, train="weights"), out=tmp_path / "run"))
    model = make_clip()
    assert restore(model, read_run(tmp_path / "run"), 3) == "checkpoints/task_01.safetensors"
    assert_same(plain_state(model), after)
    fitted(make_trainer(JointConfig(**ADAPTERS, train="weights"), out=tmp_path / "bare", checkpoints="none"))
    model = make_clip()
    assert restore(model, read_run(tmp_path / "bare"), 3) == "checkpoints/state.safetensors"
    assert_same(plain_state(model), after)
    (tmp_path / "bare" / "checkpoints" / "state.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="joint leaves no adapters"):
        restore(make_clip(), read_run(tmp_path / "bare"), 3)


# ---- per task


def test_per_task_forgets_nothing_at_all(make_trainer, make_clip):
    trainer = make_trainer(PerTaskConfig(**ADAPTERS | {"iterations": 30}))
    record = trainer.fit()
    figures = record.metrics()
    assert figures["forgetting"] == figures["union"]["forgetting"] == figures["bwt"] == 0
    assert figures["learning"] == figures["last"] > sum(record.own[0]) / 3 + 15
    for j in range(3):  # before its own adapter: the base model
        assert {record.own[i][j] for i in range(j + 1)} == {record.own[0][j]}
    assert set(record.held_out) == {record.held_out[0]} and set(record.drift) == {0.0}
    assert_same(plain_state(trainer.model), plain_state(make_clip()))


def test_per_task_trains_every_adapter_on_the_base_model(make_trainer, make_clip, tmp_path):
    """The model of a data set is that of sequential LoRA in its first task, and the journal makes it, bit for bit."""
    trainer = make_trainer(PerTaskConfig(**ADAPTERS), out=tmp_path / "run")
    trainer.fit()
    journal = fastlora.Journal(tmp_path / "run" / "adapters")
    assert [entry.name for entry in journal] == ["red", "green", "blue"]
    for index in range(3):
        alone = make_clip()
        journal.rebuild(alone, tasks=[index + 1])
        with trainer.method.evaluation_model(trainer.model, index) as model:
            assert_same(plain_state(model), plain_state(alone))
        if index == 0:
            assert_same(plain_state(alone), fitted(make_trainer(LoRAConfig(**ADAPTERS), tasks=1)))


def test_per_task_lends_the_model_and_takes_it_back(make_trainer, make_clip):
    trainer, base = make_trainer(PerTaskConfig(**ADAPTERS)), plain_state(make_clip())
    trainer.fit()
    with pytest.raises(KeyboardInterrupt), trainer.method.evaluation_model(trainer.model, 1) as model:
        assert any(not torch.equal(value, base[key]) for key, value in model.state_dict().items())
        raise KeyboardInterrupt
    assert_same(plain_state(trainer.model), base)


@pytest.mark.parametrize("config", [PerTaskConfig(**ADAPTERS), JointConfig(**ADAPTERS)], ids=["per_task", "joint"])
def test_a_run_evaluates_again_to_its_rows(config, make_trainer, make_clip, tokenizer, tmp_path):
    trainer = make_trainer(config, out=tmp_path / "run")
    trainer.fit()
    run = read_run(tmp_path / "run")
    for task in range(4):
        model, method = make_clip(), method_of(run)
        source = restore(model, run, task, method)
        if config.name == "per_task":
            assert source == (f"the base model and {task} adapter files" if task else "the base model")
        model_for = method.evaluation_model if method.per_dataset else None
        result = evaluate(model, tokenizer, trainer.stream, model_for=model_for)
        assert list(result.own) == run.record.own[task] and list(result.union) == run.record.union[task]


def test_a_per_task_model_can_be_trained_after_an_evaluation(make_trainer):
    """Nothing of inference mode stays in it."""
    trainer = make_trainer(PerTaskConfig(**ADAPTERS))
    trainer.fit()
    parameter = trainer.model.visual.proj.requires_grad_(True)
    for module in (trainer.model, trainer.model.visual):
        assert not any(p.is_inference() for p in module.parameters())
    trainer.model.encode_image(torch.randn(2, 3, 16, 16)).sum().backward()
    assert parameter.grad is not None
