"""Methods side by side: runs of one benchmark, the seeds of a method taken together."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastlora.continual.record import LABEL_SPACES
from fastlora.continual.saved_run import SavedRun
from fastlora.continual.tables import FIGURES, READ_TOGETHER, SPACE_TITLES, accuracy_table, number, text_table


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone."""

    label: str
    runs: tuple[SavedRun, ...]

    def values(self, space: str, figure: str) -> list[float | None]:
        """One value per run."""
        metrics = [run.record.metrics() for run in self.runs]
        return [(m if space == "own" else m["union"])[figure] for m in metrics]

    def mean(self, space: str, figure: str) -> float | None:
        values = self._defined(space, figure)
        return statistics.fmean(values) if values else None

    def deviation(self, space: str, figure: str) -> float | None:
        """Sample standard deviation; None below two runs."""
        values = self._defined(space, figure)
        return statistics.stdev(values) if len(values) > 1 else None

    def _defined(self, space: str, figure: str) -> list[float]:
        """All values, or none where one run has none."""
        values = self.values(space, figure)
        return [] if None in values else [value for value in values if value is not None]

    def accuracies(self, space: str) -> list[list[float]]:
        """Mean table over the runs, row 0 before training."""
        tables = [getattr(run.record, space) for run in self.runs]
        return [[statistics.fmean(cells) for cells in zip(*rows)] for rows in zip(*tables)]

    def held_out(self) -> list[float]:
        """Mean curve over the runs; empty where the stream has no held-out set."""
        return [statistics.fmean(values) for values in zip(*(run.record.held_out for run in self.runs))]


def group_runs(runs: Sequence[SavedRun]) -> list[Group]:
    """Groups in the order in which their first run was given.

    Raises:
        ValueError: runs of other benchmarks or test sets, an unfinished run, or the same run or seed twice.
    """
    first = runs[0]
    for run in runs:
        if run.status != "finished":
            raise ValueError(
                f"{run.path} is {run.status} after {run.record.finished_tasks} of {len(run.record.tasks)} tasks; only "
                "finished runs can be compared. Train it again, or look at it with `fastlora report`."
            )
        if run.manifest["hashes"] != first.manifest["hashes"] or run.record.tasks != first.record.tasks:
            raise ValueError(
                f"{run.path} ran on other tasks, classes, prompts or test labels than {first.path}; figures of "
                "different benchmarks cannot stand in one table. Compare runs of one benchmark."
            )
    groups: dict[str, list[SavedRun]] = {}
    for run in runs:
        settings = {key: value for key, value in run.config.items() if key in ("benchmark", "method")}
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
    for members in groups.values():
        seeds = [run.config["seed"] for run in members]
        if len(set(seeds)) < len(seeds):
            paths = ", ".join(str(run.path) for run in members)
            raise ValueError(
                f"{paths} repeat a seed with equal settings; the spread over seeds would be wrong. Give each once."
            )
    labels = _labels(list(groups.values()))
    return [Group(label, tuple(members)) for label, members in zip(labels, groups.values())]


def _labels(groups: list[list[SavedRun]]) -> list[str]:
    """Method names; where two groups share one, with the options in which they differ."""
    methods = [members[0].config["method"] for members in groups]
    labels = []
    for method in methods:
        rivals = [other for other in methods if other["name"] == method["name"]]
        differing = [key for key in method if any(other.get(key) != method[key] for other in rivals)]
        label = method["name"] + (f" r={method['rank']}" if "rank" in method and "rank" not in differing else "")
        labels.append(" ".join([label, *(f"{key}={method[key]}" for key in differing)]))
    return labels


def comparison_text(groups: Sequence[Group]) -> str:
    """Both accuracy tables of every group, then both tables of figures."""
    parts = []
    for group in groups:
        tasks = group.runs[0].record.tasks
        seeds = ", ".join(str(run.config["seed"]) for run in group.runs)
        mean = "mean over seeds" if len(group.runs) > 1 else "seed"
        for space in LABEL_SPACES:
            title = f"{group.label}, {mean} {seeds}, {SPACE_TITLES[space]}:"
            parts.append(f"{title}\n{accuracy_table(tasks, group.accuracies(space))}")
    for space in LABEL_SPACES:
        parts.append(f"{SPACE_TITLES[space].capitalize()}{_spread_note(groups)}:\n{figures_table(groups, space)}")
    return "\n\n".join([*parts, READ_TOGETHER])


def figures_table(groups: Sequence[Group], space: str) -> str:
    """One row per group, one column per figure."""
    header = ["method", *(f"{title} {unit}".strip() for _, title, unit in FIGURES)]
    rows = [
        [group.label, *(number(group.mean(space, key), group.deviation(space, key)) for key, _, _ in FIGURES)]
        for group in groups
    ]
    return text_table(header, rows)


def _spread_note(groups: Sequence[Group]) -> str:
    return ", mean ± s.d. over seeds" if any(len(group.runs) > 1 for group in groups) else ""


def comparison_json(groups: Sequence[Group]) -> dict[str, Any]:
    """The same, for programs: by group and label space, each figure's mean, sd and values, and the mean table."""
    return {
        "tasks": groups[0].runs[0].record.tasks,
        "groups": [
            {
                "label": group.label,
                "config": {key: group.runs[0].config[key] for key in ("benchmark", "method")},
                "seeds": [run.config["seed"] for run in group.runs],
                "runs": [str(run.path) for run in group.runs],
                "held_out_curve": group.held_out(),
            }
            | {space: _figures_json(group, space) for space in LABEL_SPACES}
            for group in groups
        ],
    }


def _figures_json(group: Group, space: str) -> dict[str, Any]:
    figures = {
        key: {"mean": group.mean(space, key), "sd": group.deviation(space, key), "values": group.values(space, key)}
        for key, _, _ in FIGURES
    }
    return figures | {"accuracy": group.accuracies(space)}


def run_text(run: SavedRun) -> str:
    """Tables of one run, also of an unfinished one."""
    parts = []
    for space in LABEL_SPACES:
        rows = getattr(run.record, space)
        parts.append(f"{SPACE_TITLES[space].capitalize()}:\n{accuracy_table(run.record.tasks, rows)}")
    metrics = run.record.metrics()
    header = [f"{title} {unit}".strip() for _, title, unit in FIGURES]
    rows = [[space, *(number(values[key]) for key, _, _ in FIGURES)] for space, values in _spaces(metrics)]
    head = f"{run.label} on {run.manifest['benchmark']}, seed {run.manifest['seed']}: {run.status}"
    return "\n\n".join([head, *parts, text_table(["label space", *header], rows), READ_TOGETHER])


def _spaces(metrics: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [("own", metrics), ("union", metrics["union"])]
