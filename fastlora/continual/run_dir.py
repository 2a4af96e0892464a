"""A run on disk. Every file but the log is replaced in one step, so that a reader never sees half of one.

    config.yaml  manifest.json  accuracy.csv  accuracy_union.csv  metrics.json  ranks.csv  log.csv
    adapters/task_NN.safetensors  checkpoints/state.safetensors  checkpoints/task_NN.safetensors
    report.html  plots/*.png

checkpoints/state.safetensors (`run_state.py`) is the commit point: the tables follow from it, and a resumed run writes
them again. Imports neither torch nor open_clip at the top: reports and comparisons read a run without them.
"""

from __future__ import annotations

import csv
import dataclasses
import fcntl
import io
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.continual.record import Record
from fastlora.files import append_whole, is_leftover, sweep, write_atomically

if TYPE_CHECKING:
    from torch import nn

    from fastlora.journal import Journal

LOG_COLUMNS = ("task", "iteration", "loss", "lr", "kappa", "active_rank")
RANK_COLUMNS = ("task", "module", "rank", "active_rank", "delta_norm")
TABLES = {"own": "accuracy.csv", "union": "accuracy_union.csv"}
STATE = Path("checkpoints") / "state.safetensors"
FOLDERS = ("adapters", "checkpoints", "plots")
OWN_FILES = ("config.yaml", "manifest.json", "metrics.json", "ranks.csv", "log.csv", *TABLES.values(), *FOLDERS)
STATUSES = ("running", "finished", "interrupted", "failed")


class RunDir:
    """The directory of a run in progress.

    One process at a time has it: log.csv is locked until `close`, or until the process ends, however it does.

    Args:
        path: the directory; it exists.
    Raises:
        RuntimeError: another process has it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._manifest, self._start = path, _manifest(path), time.perf_counter()
        self._earlier = self._manifest.get("duration_seconds", 0.0)
        self._log = _locked(path / "log.csv")

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
        run = cls(path)
        run.begin(config, manifest)
        return run

    @property
    def manifest(self) -> dict[str, Any]:
        """What manifest.json holds; empty before `begin` of a new run."""
        return dict(self._manifest)

    def begin(
        self, config: Mapping[str, Any], manifest: Mapping[str, Any], log: str | None = None, journal: int = 0
    ) -> None:
        """Bring the directory to a commit point: status running, `log` in log.csv, `journal` adapter files, no more.

        By default to the start of a run.
        """
        for folder in (self.path, *(self.path / name for name in FOLDERS)):
            folder.mkdir(exist_ok=True)
            sweep(folder)
        for path in (self.path / "adapters").glob("task_*.safetensors"):
            if int(path.stem.removeprefix("task_")) > journal:  # of a task that was not committed
                path.unlink()
        _write(self.path / "config.yaml", _yaml(config))
        self._manifest = {}
        self._log.truncate(0)
        append_whole(self._log, (",".join(LOG_COLUMNS) + "\n" if log is None else log).encode())
        self.update(**{"format": 1, "status": "running", "finished_tasks": 0} | dict(manifest))

    def close(self) -> None:
        """Give the directory free for other processes."""
        self._log.close()

    def update(self, **changes: Any) -> None:
        """Write manifest.json with `changes` and the duration so far, that of earlier processes included."""
        self._manifest |= changes
        self._manifest["duration_seconds"] = round(self._earlier + time.perf_counter() - self._start, 3)
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
        """Whole lines in one write: a kill or a full disk leaves whole lines behind."""
        append_whole(self._log, _csv(None, rows).encode())

    def log(self) -> str:
        """Content of log.csv."""
        return (self.path / "log.csv").read_text()

    @property
    def state_path(self) -> Path:
        """The commit point."""
        return self.path / STATE

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
            "overwrites one. Pass another --out, or --resume to go on with it, or remove it first."
        )
    parent = path.absolute().parent
    if not parent.is_dir():
        raise FileNotFoundError(
            f"{parent} is no directory, so the run {path.name!r} cannot be made in it. Make it first."
        )
    if not os.access(path if path.exists() else parent, os.W_OK):
        raise PermissionError(f"{path if path.exists() else parent} cannot be written. Pass an --out that can.")


def check_run_directory(path: Path) -> None:
    """Raises FileExistsError unless `path` is the directory of a run, or what a kill left of one in the making."""
    names = [entry.name for entry in path.iterdir()] if path.is_dir() else [str(path)]
    strange = [name for name in names if name not in OWN_FILES and not is_leftover(name)]
    if strange and not (path / "manifest.json").is_file():
        raise FileExistsError(
            f"{path} is no run directory (it holds {strange[0]} and no manifest.json), so there is nothing to resume. "
            "Pass the directory of a run, or a new one."
        )


def _what_is_there(path: Path) -> str:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        return f" (a run, {manifest['status']}, {manifest['finished_tasks']} of {len(manifest['tasks'])} tasks)"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def _manifest(path: Path) -> dict[str, Any]:
    try:
        found = json.loads((path / "manifest.json").read_text())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path / 'manifest.json'} is not JSON ({error}). Restore it, or remove it.") from None
    if not isinstance(found, dict) or not isinstance(found.get("duration_seconds", 0.0), (int, float)):
        raise ValueError(f"{path / 'manifest.json'} is no manifest of a run. Restore it, or remove it.")
    return found


def _locked(path: Path) -> io.FileIO:
    """`path` opened for appending, and locked; the lock goes with the file, also where the process is killed."""
    file = open(path, "ab", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RuntimeError(
            f"{path.parent} is in use: another process trains into it. Wait for it or stop it, or pass another --out."
        ) from None
    except OSError:
        pass  # a file system without locks
    return file


def _csv(header: Sequence[str] | None, rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([header] if header else [])
    writer.writerows(rows)
    return text.getvalue()


def _yaml(config: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(config), sort_keys=False)
