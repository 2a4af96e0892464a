"""The model of a saved run after any of its tasks."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from fastlora.continual.manifest import hashes
from fastlora.continual.saved_run import SavedRun
from fastlora.continual.stream import TaskStream
from fastlora.journal import Journal


def check_same_tests(run: SavedRun, stream: TaskStream) -> None:
    """Raises ValueError unless the benchmark still has the classes, prompts and test labels that the run saw."""
    for task in stream.tasks:
        if run.manifest["hashes"].get(task.name) != hashes(task):
            raise ValueError(
                f"{run.path} was measured on other classes, prompts or test labels of {task.name!r} than the benchmark "
                "has now; its figures cannot be checked. Install the versions that its manifest.json tells."
            )


def restore(model: nn.Module, run: SavedRun, task: int) -> str:
    """Bring the benchmark's base model to the state after `task` (0: before training).

    The checkpoint of that task is read where it was kept; else the adapters of the tasks up to it are merged again, one
    after the other, which gives the same weights bit for bit.

    Returns:
        What was read, in words.
    Raises:
        ValueError: no such task in the run, or a file does not fit the model. FileNotFoundError: neither the checkpoint
            nor every adapter file is there.
    """
    finished = run.record.finished_tasks
    if not 0 <= task <= finished:
        raise ValueError(f"task {task} was asked for; {run.path} has finished {finished} tasks. Give 0 to {finished}.")
    if task == 0 or not run.record.ranks:
        return "the base model"
    checkpoint = run.path / "checkpoints" / f"task_{task:02d}.safetensors"
    if checkpoint.is_file():
        _load_checkpoint(model, checkpoint)
        return str(checkpoint.relative_to(run.path))
    Journal(run.path / "adapters").rebuild(model, after=task)
    return f"{task} adapter files"


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
