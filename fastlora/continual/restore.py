"""The model of a saved run after any of its tasks, and a run that was cut short where it can go on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastlora.continual.config import RunConfig, method_config
from fastlora.continual.manifest import differences
from fastlora.continual.methods import Method, build_method
from fastlora.continual.resume import changed_versions, check_same_config, check_same_model, what_stopped
from fastlora.continual.run_dir import STATE, RunDir
from fastlora.continual.run_state import RunState, read_state, weights_sha256
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


def open_run(
    out: Path,
    resume: bool,
    config: RunConfig,
    manifest: Mapping[str, Any],
    base: Mapping[str, str],
    model: nn.Module,
    method: Method,
    stream: TaskStream,
) -> tuple[RunDir, RunState | None]:
    """Make a run directory; or, where one is to be resumed, bring it, model and method to its last commit point.

    Args:
        manifest: what a run that starts now has in its own.
        base: fingerprint of `model`, which is the one from before training.
    Returns:
        The directory, and the state there; None where the run starts from the beginning.
    Raises:
        ValueError: the run was started with another configuration, benchmark or model; the commit point or an adapter
            file is damaged or of another version. RuntimeError: another process has the directory. OSError: a file is
            missing, or cannot be written. What was in the directory has not changed.
    """
    if not (resume and out.exists()):
        return RunDir.create(out, config.as_dict(), manifest), None
    run = RunDir(out)
    try:
        return run, _take_up(run, config, manifest, base, model, method, stream)
    except BaseException:
        run.close()
        raise


def _take_up(
    run: RunDir,
    config: RunConfig,
    manifest: Mapping[str, Any],
    base: Mapping[str, str],
    model: nn.Module,
    method: Method,
    stream: TaskStream,
) -> RunState | None:
    before = run.manifest
    if not run.state_path.exists():
        if before.get("finished_tasks", 0):
            raise FileNotFoundError(
                f"{run.state_path} is missing, so the {before['finished_tasks']} finished tasks of {run.path} cannot "
                "be taken up. Restore it from a copy, or train again with another --out."
            )
        run.begin(config.as_dict(), manifest)
        return None
    state = read_state(run.state_path)
    check_same_config(run.path, state.config, config)
    check_same_data(run.path, state.data, stream)
    check_same_model(run.path, state.base, base)
    _load_state(model, method, run, state)
    resumed = {"after_tasks": state.record.finished_tasks, "stopped": what_stopped(before)}
    kept = {key: value for key, value in before.items() if key not in ("status", "error")}
    kept["resumes"] = [*before.get("resumes", []), resumed | changed_versions(before, manifest)]
    run.begin(config.as_dict(), {**manifest, **kept}, log=state.log, journal=state.journal)
    # the tables of a task come with its row
    done = [entry for entry in state.record.ranks if entry.task <= state.record.finished_tasks]
    run.write_record(dataclasses.replace(state.record, ranks=done), seconds=state.seconds)
    return state


def _load_state(model: nn.Module, method: Method, run: RunDir, state: RunState) -> None:
    if len(run.journal) < state.journal:
        raise FileNotFoundError(
            f"{run.journal.directory} holds {len(run.journal)} of the {state.journal} adapter files that "
            f"{run.state_path} follows on. Put them back, or train again with another --out."
        )
    if method.journaled:
        run.journal.rebuild(model, after=state.journal)
    unknown = model.load_state_dict(state.model, strict=False).unexpected_keys
    same_device = next(model.parameters()).device.type == state.device  # elsewhere a merge may round in another way
    if unknown or (same_device and weights_sha256(model) != state.weights):
        raise ValueError(
            f"the weights that {run.path} gives are not those that {run.state_path} was written with, so a file in it "
            "is of another run. Restore the directory from a copy, or train again with another --out."
        )
    method.load_state_dict(state.method)
    if state.trained:
        method.attach(model)


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
