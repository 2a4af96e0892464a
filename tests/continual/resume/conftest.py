"""Runs of every kind of method, with other methods of our own."""

import os

import pytest
from continual.resume.cases import (
    CONFIGS,
    Killed,
    Plain,
    Stateful,
    results,
    stop,
)

from fastlora.continual import Trainer, methods
from fastlora.continual import config as configs


@pytest.fixture(autouse=True)
def more_methods(monkeypatch):
    for method in (Stateful, Plain):
        monkeypatch.setitem(methods.METHODS, method.config_class.name, method)
        monkeypatch.setitem(configs.CONFIGS, method.config_class.name, method.config_class)


@pytest.fixture(autouse=True)
def no_wait_for_the_disk(monkeypatch):
    """A killed process loses nothing that it has written, synced or not."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def train(make_clip, tokenizer, make_stream):
    """kind, directory, options -> (trainer, model), nothing trained yet."""

    def make(kind, out, **options):
        model = make_clip()
        options = {"seed": 1, "progress": False, "log_every": 2, "checkpoints": "all"} | options
        return Trainer(model, tokenizer, make_stream(), CONFIGS[kind], out=out, **options), model

    return make


@pytest.fixture
def whole(train, tmp_path_factory):
    """kind -> results of a run that nobody stopped."""

    def run(kind, cache={}):  # noqa: B006  one for all tests
        if kind not in cache:
            out = tmp_path_factory.mktemp("whole") / "run"
            trainer, model = train(kind, out)
            trainer.fit()
            cache[kind] = results(out, model)
        return cache[kind]

    return run


@pytest.fixture
def stopped(train, tmp_path):
    """Directory of a run with one finished task."""
    trainer, _ = train("codyra", tmp_path / "run")
    trainer.method.begin_task = stop()(trainer.method.begin_task)
    with pytest.raises(Killed):
        trainer.fit()
    return tmp_path / "run"
