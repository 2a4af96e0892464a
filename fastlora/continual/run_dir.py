"""A run on disk. Every file but the log is replaced in one step, so that a reader never sees half of one.

    config.yaml  manifest.json  accuracy.csv  accuracy_union.csv  metrics.json  ranks.csv  log.csv
    adapters/task_NN.safetensors  checkpoints/task_NN.safetensors  report.html  plots/*.png

Imports neither torch nor open_clip at the top: reports and comparisons read a run without them.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.continual.record import Record
from fastlora.files import write_atomically

if TYPE_CHECKING:
    from torch import nn

    from fastlora.journal import Journal

LOG_COLUMNS = ("task", "iteration", "loss", "lr", "kappa", "active_rank")
RANK_COLUMNS = ("task", "module", "rank", "active_rank", "delta_norm")
TABLES = {"own": "accuracy.csv", "union": "accuracy_union.csv"}
STATUSES = ("running", "finished", "interrupted", "failed")


class RunDir:
    """The directory of a run in progress."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self._manifest, self._start = path, manifest, time.perf_counter()

    @classmethod
    def create(cls, path: str | os.PathLike[str], config: Mapping[str, Any], manifest: Mapping[str, Any]) -> RunDir:
        """Make the directory and write what is known before training.

        Raises:
            FileExistsError: `path` exists and is not an empty directory.
            OSError: the parent does not exist or cannot be written.
        """
        path = Path(path)
        check_new_directory(path)
        path.mkdir(exist_ok=True)
        for folder in ("adapters", "checkpoints", "plots"):
            (path / folder).mkdir()
        run = cls(path, {"format": 1, "status": "running", "finished_tasks": 0, **manifest})
        _write(path / "config.yaml", _yaml(config))
        (path / "log.csv").write_text(",".join(LOG_COLUMNS) + "\n")
        run.update()
        return run

    def update(self, **changes: Any) -> None:
        """Write manifest.json with `changes` and the duration so far."""
        self._manifest |= changes
        self._manifest["duration_seconds"] = round(time.perf_counter() - self._start, 3)
        _write(self.path / "manifest.json", json.dumps(self._manifest, indent=2) + "\n")

    def write_record(self, record: Record, **changes: Any) -> None:
        """Write accuracy tables, ranks and metrics; then the manifest that counts the rows, with `changes`."""
        for space, name in TABLES.items():
            rows = [[i, *map(repr, row)] for i, row in enumerate(getattr(record, space))]
            _write(self.path / name, _csv(["after_task", *record.tasks], rows))
        _write(self.path / "ranks.csv", _csv(RANK_COLUMNS, map(dataclasses.astuple, record.ranks)))
        _write(self.path / "metrics.json", json.dumps(record.metrics(), indent=2) + "\n")
        self.update(finished_tasks=record.finished_tasks, **changes)

    def append_log(self, rows: Iterable[Sequence[Any]]) -> None:
        """Whole lines in one write: a kill leaves whole lines behind."""
        with open(self.path / "log.csv", "a", newline="") as file:
            file.write(_csv(None, rows))

    @property
    def journal(self) -> Journal:
        from fastlora.journal import Journal

        return Journal(self.path / "adapters")

    def save_checkpoint(self, task: int, model: nn.Module) -> Path:
        """The model's plain state_dict in its own dtypes."""
        import safetensors.torch

        state = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
        path = self.path / "checkpoints" / f"task_{task:02d}.safetensors"
        write_atomically(path, safetensors.torch.save(state, {"format": "pt", "task": str(task)}))
        return path


def _write(path: Path, text: str) -> None:
    write_atomically(path, text.encode())


def check_new_directory(path: Path) -> None:
    """Raises unless a run can be made at `path`: absent or empty, in a directory that can be written."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(
            f"{path} exists already{_what_is_there(path)}; a run needs a new or an empty directory, and never "
            "overwrites one. Pass another --out, or remove it first."
        )
    parent = path.absolute().parent
    if not parent.is_dir():
        raise FileNotFoundError(
            f"{parent} is no directory, so the run {path.name!r} cannot be made in it. Make it first."
        )
    if not os.access(path if path.exists() else parent, os.W_OK):
        raise PermissionError(f"{path if path.exists() else parent} cannot be written. Pass an --out that can.")


def _what_is_there(path: Path) -> str:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        return f" (a run, {manifest['status']}, {manifest['finished_tasks']} of {len(manifest['tasks'])} tasks)"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _csv(header: Sequence[str] | None, rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([header] if header else [])
    writer.writerows(rows)
    return text.getvalue()


def _yaml(config: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(config), sort_keys=False)
