"""Reading a run directory back; also an unfinished one."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastlora.continual.config import RunConfig, run_config
from fastlora.continual.group_labels import is_control
from fastlora.continual.record import RankEntry, Record
from fastlora.continual.run_dir import TABLES


@dataclass(frozen=True)
class SavedRun:
    """A run as read from its directory.

    Args:
        path: of the run directory.
        config: content of config.yaml, the effective settings.
        manifest: content of manifest.json: versions, hashes, tasks, status, seconds.
        record: accuracies, ranks and drift.
        log: one mapping of column to number (None: empty) per line.
        selection: content of selection.json; without comparisons where the run has none.
    """

    path: Path
    config: dict[str, Any]
    manifest: dict[str, Any]
    record: Record
    log: list[dict[str, float | None]]
    selection: dict[str, Any] = field(default_factory=lambda: {"comparisons": []})

    @property
    def status(self) -> str:
        return self.manifest["status"]

    @property
    def run_config(self) -> RunConfig:
        """The settings, checked again. Raises ValueError where this version does not have them."""
        return run_config(self.config)

    @property
    def stages(self) -> list[str]:
        """What each stretch of training was on: the tasks, or all of them at once."""
        return ["all tasks"] if self.config["method"]["name"] == "joint" else self.record.tasks

    @property
    def label(self) -> str:
        """Method and what sets it apart, for legends: 'codyra', 'codyra gates=null_control', 'lora r=4'."""
        method = self.config["method"]
        rank = f" r={method['rank']}" if method["name"] == "lora" else ""
        return method["name"] + rank + (f" gates={method['gates']}" if is_control(method) else "")


def read_run(path: str | os.PathLike[str]) -> SavedRun:
    """Read what a run has written so far.

    Args:
        path: run directory, as `fastlora train` or `Trainer` makes it; an unfinished one will do.
    Returns:
        SavedRun: settings, manifest, accuracies, ranks and log.
    Raises:
        FileNotFoundError: `path` is no run directory.
        ValueError: a file of it cannot be read as what it should be; the file is named.
    """
    path = Path(path)
    if not (path / "manifest.json").is_file():
        raise FileNotFoundError(
            f"{path} is not a run directory (it has no manifest.json). Pass a directory that `fastlora train` made."
        )
    manifest = _read(path / "manifest.json", json.loads)
    config = _read(path / "config.yaml", _from_yaml)
    tables = {space: _read(path / name, _table) for space, name in TABLES.items() if (path / name).exists()}
    metrics = _read(path / "metrics.json", json.loads) if (path / "metrics.json").exists() else {}
    ranks = _read(path / "ranks.csv", _ranks) if (path / "ranks.csv").exists() else []
    record = Record(
        tasks=list(manifest["tasks"]),
        own=tables.get("own", []),
        union=tables.get("union", []),
        held_out=metrics.get("held_out_curve", []),
        ranks=ranks,
        drift=metrics.get("drift_curve", []),
    )
    log = _read(path / "log.csv", _log)
    selection: dict[str, Any] = {"comparisons": []}
    if (path / "selection.json").exists():
        selection = _read(path / "selection.json", _selection)
    return SavedRun(path, config, manifest, record, log, selection)


def _read(path: Path, parse: Any) -> Any:
    try:
        return parse(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing, so the run cannot be read. Restore it, or train again.") from None
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {error}). Restore it, or train again."
        ) from error


def _from_yaml(text: str) -> dict[str, Any]:
    import yaml

    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict) or "name" not in (config.get("method") or {}):
        raise ValueError("it has no method.name")
    return config


def _rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


def _table(text: str) -> list[list[float]]:
    header, *rows = csv.reader(text.splitlines())
    if any(len(row) != len(header) for row in rows):
        raise ValueError("a row has another number of columns than the header")
    return [[float(value) for value in row[1:]] for row in rows]


def _ranks(text: str) -> list[RankEntry]:
    return [
        RankEntry(int(row["task"]), row["module"], int(row["rank"]), int(row["active_rank"]), float(row["delta_norm"]))
        for row in _rows(text)
    ]


def _selection(text: str) -> dict[str, Any]:
    selection = json.loads(text)
    for comparison in selection["comparisons"]:
        comparison["name"], float(comparison["jaccard"]), float(comparison["chance"])
    return selection


def _log(text: str) -> list[dict[str, float | None]]:
    return [{key: float(value) if value else None for key, value in row.items()} for row in _rows(text)]
