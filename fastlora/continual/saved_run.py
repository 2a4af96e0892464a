"""Reading a run directory back; also an unfinished one."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastlora.continual.config import RunConfig, run_config
from fastlora.continual.group_labels import is_control
from fastlora.continual.record import RankEntry, Record
from fastlora.continual.run_dir import STATUSES, TABLES
from fastlora.continual.yaml_text import parse_yaml


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
        try:
            return run_config(self.config)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.path / 'config.yaml'} is not of this version: {error}") from error

    @property
    def stages(self) -> list[str]:
        """What each stretch of training was on: the tasks, or all of them at once."""
        return ["all tasks"] if self.config["method"]["name"] == "joint" else self.record.tasks

    @property
    def label(self) -> str:
        """Method and what sets it apart, for legends: 'codyra', 'codyra gates=null_control', 'lora r=4'."""
        method = self.config["method"]
        rank = f" r={method.get('rank')}" if method["name"] == "lora" else ""
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
    manifest = _read(path / "manifest.json", _manifest)
    config = _read(path / "config.yaml", _from_yaml)
    tables = {space: _read(path / name, _table) for space, name in TABLES.items() if (path / name).exists()}
    metrics = _read(path / "metrics.json", _curves) if (path / "metrics.json").exists() else {}
    ranks = _read(path / "ranks.csv", _ranks) if (path / "ranks.csv").exists() else []
    record = Record(
        tasks=manifest["tasks"],
        own=tables.get("own", []),
        union=tables.get("union", []),
        held_out=metrics.get("held_out_curve", []),
        ranks=ranks,
        drift=metrics.get("drift_curve", []),
    )
    record = _whole_evaluations(path, record)
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
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, csv.Error) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {error}). Restore it, or train again."
        ) from error


def _whole_evaluations(path: Path, record: Record) -> Record:
    """The evaluations that every table has: a run that is at work, or was stopped there, has one more in those it wrote first.

    Raises:
        ValueError: the tables are of another number of tasks, or differ by more than that.
    """
    tasks = len(record.tasks)
    for space, name in TABLES.items():
        found = [len(row) for row in getattr(record, space)]
        if set(found) - {tasks} or len(found) > tasks + 1:
            raise ValueError(
                f"{path / name} has {len(found)} rows of {sorted(set(found))} accuracies; of {tasks} tasks there are at most "
                f"{tasks + 1}, of {tasks} each. Restore it, or train again."
            )
    curves = [curve for curve in (record.held_out, record.drift) if curve]  # not every run has them
    lengths = [len(record.own), len(record.union), *map(len, curves)]
    rows = min(lengths)
    if max(lengths) - rows > 1:
        raise ValueError(
            f"the tables of {path} ({', '.join(TABLES.values())}, metrics.json) are of {lengths} evaluations. Restore them, or "
            "train again."
        )
    return dataclasses.replace(
        record,
        own=record.own[:rows],
        union=record.union[:rows],
        held_out=record.held_out[:rows],
        drift=record.drift[:rows],
    )


def _manifest(text: str) -> dict[str, Any]:
    found = _mapping(json.loads(text))
    for key, kinds in _MANIFEST.items():
        if not isinstance(found.get(key), kinds):
            raise ValueError(f"it has no {key}")
    if found["status"] not in STATUSES or not all(isinstance(task, str) for task in found["tasks"]):
        raise ValueError(f"status {found['status']!r}, tasks {found['tasks']!r}")
    for key, names in _FIGURES.items():
        if found.get(key) is not None:
            _numbers([found[key][name] for name in names])
    return found


# what reports and comparisons look at
_MANIFEST: dict[str, type | tuple[type, ...]] = {
    "status": str, "tasks": list, "benchmark": str, "seed": int, "device": str, "duration_seconds": (int, float), "hashes": dict
}  # fmt: skip
_FIGURES = {"seconds": ("train", "evaluate"), "null_model": ("total_shrink", "expected_rank")}


def _curves(text: str) -> dict[str, list[float]]:
    found = _mapping(json.loads(text))
    return {key: _numbers(found[key]) for key in ("held_out_curve", "drift_curve") if key in found}


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}")
    return value


def _numbers(values: Any) -> list[float]:
    found = [float(value) for value in values]
    if not all(map(math.isfinite, found)):
        raise ValueError("it holds a number that is not finite")
    return found


def _from_yaml(text: str) -> dict[str, Any]:
    config = parse_yaml(text)
    if not isinstance(config, dict) or not isinstance(config.get("method"), dict):
        raise ValueError("it has no method")
    if not isinstance(config["method"].get("name"), str) or not isinstance(config.get("seed"), int):
        raise ValueError("it has no method.name, or no seed")
    json.dumps(config, sort_keys=True, default=str)  # comparisons sort by it, which takes names as keys
    return config


def _rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


def _table(text: str) -> list[list[float]]:
    header, *rows = csv.reader(text.splitlines())
    if any(len(row) != len(header) for row in rows):
        raise ValueError("a row has another number of columns than the header")
    found = [_numbers(row[1:]) for row in rows]
    if not all(0 <= value <= 100 for row in found for value in row):
        raise ValueError("an accuracy is no percentage")
    return found


def _ranks(text: str) -> list[RankEntry]:
    return [
        RankEntry(int(row["task"]), row["module"], int(row["rank"]), int(row["active_rank"]), float(row["delta_norm"]))
        for row in _rows(text)
    ]


def _selection(text: str) -> dict[str, Any]:
    selection = _mapping(json.loads(text))
    for comparison in selection["comparisons"]:
        shown = [(comparison["jaccard"], comparison["chance"]), *comparison.get("towers", {}).values()]
        if not isinstance(comparison["name"], str) or any(len(_numbers(pair)) != 2 for pair in shown):
            raise ValueError("a comparison has no name, or other than two numbers")
    return selection


def _log(text: str) -> list[dict[str, float | None]]:
    return [{key: float(value) if value else None for key, value in row.items()} for row in _rows(text)]
