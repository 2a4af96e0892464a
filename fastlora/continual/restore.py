"""The model of a saved run after any of its tasks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastlora.continual.config import method_config
from fastlora.continual.manifest import differences
from fastlora.continual.methods import Method, build_method
from fastlora.continual.run_dir import STATE
from fastlora.continual.run_state import read_state
from fastlora.continual.saved_run import SavedRun
from fastlora.continual.stream import TaskStream
from fastlora.journal import Journal


def check_same_tests(run: SavedRun, stream: TaskStream) -> None:
    """Raises ValueError unless the benchmark still has the classes, prompts and test images that the run saw."""
    found = differences(run.manifest, stream, with_training=False)
    _refuse(run.path, found, "its figures cannot be checked")


def check_same_data(path: Path, manifest: Mapping[str, Any], stream: TaskStream) -> None:
    """Raises ValueError unless, beside the tests, the training images are those of the manifest: to go on with the run."""
    _refuse(path, differences(manifest, stream, with_training=True), "it cannot go on")


def _refuse(path: Path, found: list[str], consequence: str) -> None:
    if found:
        raise ValueError(
            f"{path} was measured on other classes, prompts or images than the benchmark has now, so {consequence}: "
            f"{'; '.join(found)}. Restore the data sets, or install the versions that its manifest.json tells."
        )


def method_of(run: SavedRun) -> Method:
    """The run's method with its options, as it is before the first task."""
    return build_method(method_config(**run.config["method"]))


def restore(model: nn.Module, run: SavedRun, task: int, method: Method | None = None) -> str:
    """Bring the benchmark's base model to the state after `task` (0: before training).

    The checkpoint of that task is read where it was kept; else the adapters of the tasks up to it are merged again, one
    after the other, which gives the same weights bit for bit. Of a method that no journal rebuilds, the commit point
    holds the weights after the last task.

    Args:
        method: `method_of` the run, for the caller to evaluate with: afterwards its evaluation_model gives what it gave
            after that task.
    Returns:
        What was read, in words.
    Raises:
        ValueError: no such task in the run, or a file does not fit the model. FileNotFoundError: neither the checkpoint
            nor every adapter file is there.
    """
    method = method or method_of(run)
    finished = run.record.finished_tasks
    if not 0 <= task <= finished:
        raise ValueError(f"task {task} was asked for; {run.path} has finished {finished} tasks. Give 0 to {finished}.")
    if task == 0 or not method.trains:
        return "the base model"
    if method.beside_weights:
        return _attach(model, run, task, method)
    checkpoint = run.path / "checkpoints" / f"task_{1 if method.joint else task:02d}.safetensors"
    if checkpoint.is_file() and not method.per_dataset:
        _load_checkpoint(model, checkpoint)
        return str(checkpoint.relative_to(run.path))
    if method.journaled or method.per_dataset or not (run.path / STATE).is_file():
        return method.rebuild(model, Journal(run.path / "adapters"), task)
    state = read_state(run.path / STATE)
    if state.trained != (1 if method.joint else task):
        return method.rebuild(model, Journal(run.path / "adapters"), task)
    model.load_state_dict(state.model)
    return str(STATE)


def _attach(model: nn.Module, run: SavedRun, task: int, method: Method) -> str:
    state = read_state(run.path / STATE)
    if state.trained != task:
        raise ValueError(
            f"{run.config['method']['name']} keeps what it learned beside the weights, and {run.path / STATE} holds it as "
            f"after task {state.trained}; task {task} was asked for. Give {state.trained}, or 0 for the base model."
        )
    model.load_state_dict(state.model, strict=False)
    method.load_state_dict(state.method)
    method.attach(model)
    return str(STATE)


def _load_checkpoint(model: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise ValueError(
            f"{path} does not fit the benchmark's model ({text}). Remove it to rebuild from adapters."
        ) from None
