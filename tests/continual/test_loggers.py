"""Figures for TensorBoard and Weights & Biases: stand-ins take them down; the real TensorBoard where it is installed."""

import sys
import types

import pytest

from fastlora.continual import Trainer
from fastlora.continual.config import CoDyRAConfig, RunConfig, ZeroShotConfig
from fastlora.continual.record import Record
from fastlora.continual.saved_run import read_run

METHOD = CoDyRAConfig(rank=2, iterations=6, batch_size=8, kappa_max=0.2)


@pytest.fixture
def tensorboard(monkeypatch):
    """What is written to the stand-in of torch.utils.tensorboard: (folder, name, step, value), then 'closed'."""
    written = []

    class SummaryWriter:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, step):
            written.append((self.folder, name, step, value))

        def close(self):
            written.append("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return written


@pytest.fixture
def wandb(monkeypatch):
    """What is sent to the stand-in of wandb: init's options, (step, values), then 'finished'."""
    sent = []

    class Run:
        def log(self, values, step):
            sent.append((step, values))

        def finish(self):
            sent.append("finished")

    module = types.ModuleType("wandb")
    module.init = lambda **options: sent.append(options) or Run()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return sent


def test_both_get_what_the_files_hold(clip, tokenizer, stream, tmp_path, tensorboard, wandb):
    options = {"out": tmp_path / "run", "progress": False, "log_every": 3, "log_to": ("tensorboard", "wandb")}
    record = Trainer(clip, tokenizer, stream, METHOD, **options).fit()
    run = read_run(tmp_path / "run")
    assert run.config["log_to"] == ["tensorboard", "wandb"]
    assert tensorboard.pop() == "closed" and wandb.pop() == "finished"

    losses = [(step, value) for folder, name, step, value in tensorboard if name == "train/loss"]
    assert losses == [(6 * (int(row["task"]) - 1) + int(row["iteration"]) + 1, row["loss"]) for row in run.log]
    assert {folder for folder, *_ in tensorboard} == {str(tmp_path / "run" / "tensorboard")}
    accuracies = [(step, value) for _, name, step, value in tensorboard if name == "accuracy_union/green"]
    assert accuracies == [(6 * i, row[1]) for i, row in enumerate(record.union)]
    held_out = [value for _, name, _, value in tensorboard if name == "accuracy_held_out"]
    assert held_out == record.held_out

    first, *figures = wandb
    assert first["project"] == "fastlora" and first["name"] == "run" and first["config"]["method"]["rank"] == 2
    assert {(step, name): value for step, values in figures for name, value in values.items()} == {
        (step, name): value for _, name, step, value in tensorboard
    }
    steps = [step for step, _ in figures]
    assert steps == sorted(steps)


def test_newest_row_by_name():
    record = Record(["red", "green"])
    record.add([1.0, 2.0], [0.5, 0.25], 9.0, 0.0)
    record.add([3.0, 4.0], [1.5, 1.25], 8.0, 2.0)
    assert record.newest() == {
        "accuracy_own/red": 3.0,
        "accuracy_own/green": 4.0,
        "accuracy_union/red": 1.5,
        "accuracy_union/green": 1.25,
        "accuracy_held_out": 8.0,
        "drift": 2.0,
    }


def test_closed_after_a_failure(clip, tokenizer, stream, tmp_path, tensorboard, monkeypatch):
    trainer = Trainer(clip, tokenizer, stream, METHOD, out=tmp_path / "run", progress=False, log_to=["tensorboard"])
    monkeypatch.setattr(trainer.method, "extra_loss", lambda ctx: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    assert tensorboard[-1] == "closed" and tensorboard.count("closed") == 1


def test_a_missing_package_is_told_before_training(clip, tokenizer, stream, tmp_path, monkeypatch):
    for name, module in (("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=f"log_to names {name}, which is not installed. Run: pip install {name}"):
            Trainer(clip, tokenizer, stream, METHOD, out=tmp_path / "run", log_to=[name])
    assert not (tmp_path / "run").exists()


def test_loggers_need_a_run_directory(clip, tokenizer, stream, tensorboard):
    with pytest.raises(ValueError, match=r"log_to is \['tensorboard'\], which needs a run directory. Pass out"):
        Trainer(clip, tokenizer, stream, METHOD, log_to=["tensorboard"])


def test_option():
    assert RunConfig(log_to=["wandb", "wandb"]).log_to == ("wandb",) and RunConfig().log_to == ()
    with pytest.raises(
        ValueError, match="log_to is 'tensorbord'; accepted: tensorboard, wandb. Did you mean 'tensorboard'"
    ):
        RunConfig(log_to=["tensorbord"])
    with pytest.raises(ValueError, match=r"log_to is 'wandb'; it must be a list, such as \[tensorboard\]"):
        RunConfig(log_to="wandb")


def test_real_tensorboard(clip, tokenizer, stream, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"out": tmp_path / "run", "progress": False, "log_to": ["tensorboard"]}
    record = Trainer(clip, tokenizer, stream, ZeroShotConfig(), **options).fit()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    values = [event.value for event in events.Scalars("accuracy_own/red")]
    assert values == pytest.approx([row[0] for row in record.own])
