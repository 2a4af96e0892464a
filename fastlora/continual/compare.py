"""Methods side by side: runs of one benchmark, the seeds of a method taken together."""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastlora.continual.config import UsageError, check_one_of
from fastlora.continual.group_labels import labels_of, settings_of
from fastlora.continual.record import LABEL_SPACES, RankEntry
from fastlora.continual.saved_run import SavedRun
from fastlora.continual.tables import FIGURES, READ_TOGETHER, SPACE_TITLES, accuracy_table, number, text_table

LOWER_IS_BETTER = ("forgetting", "mean_rank")
SORT_KEYS = ("given", "label", *(key for key, _, _ in FIGURES))


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone."""

    label: str
    runs: tuple[SavedRun, ...]

    @functools.cached_property
    def _metrics(self) -> list[dict[str, Any]]:
        return [run.record.metrics() for run in self.runs]

    @property
    def method(self) -> str:
        return self.runs[0].config["method"]["name"]

    @property
    def seeds(self) -> list[int]:
        return [run.config["seed"] for run in self.runs]

    def values(self, space: str, figure: str) -> list[float | None]:
        """One value per run."""
        return [(m if space == "own" else m["union"])[figure] for m in self._metrics]

    def mean(self, space: str, figure: str) -> float | None:
        return mean_of(self.values(space, figure))

    def deviation(self, space: str, figure: str) -> float | None:
        """Sample standard deviation; None below two runs."""
        return deviation_of(self.values(space, figure))

    def accuracies(self, space: str) -> list[list[float]]:
        """Mean table over the runs, row 0 before training."""
        tables = [getattr(run.record, space) for run in self.runs]
        return [[statistics.fmean(cells) for cells in zip(*rows)] for rows in zip(*tables)]

    def held_out(self) -> list[float]:
        """Mean curve over the runs; empty where the stream has no held-out set."""
        return [statistics.fmean(values) for values in zip(*(run.record.held_out for run in self.runs))]

    def drifts(self) -> list[float | None]:
        """Per run the distance from the pretrained weights at the end; None where it was not measured."""
        return [run.record.drift[-1] if run.record.drift else None for run in self.runs]

    def ranks(self, keep: Callable[[RankEntry], bool] = lambda entry: True) -> list[float | None]:
        """Per run the mean kept rank over tasks and the modules that `keep` accepts; None where there is none."""
        kept = [[entry.active_rank for entry in run.record.ranks if keep(entry)] for run in self.runs]
        return [statistics.fmean(values) if values else None for values in kept]

    def delta_norms(self) -> list[float | None]:
        """Per run ||delta W||_F of a task over all modules, mean over the tasks."""
        return [_mean_task_norm(run.record.ranks) for run in self.runs]


def mean_of(values: Sequence[float | None]) -> float | None:
    """None where one is not defined: a mean over other runs than the next figure's would mislead."""
    defined = [value for value in values if value is not None]
    return statistics.fmean(defined) if defined and len(defined) == len(values) else None


def deviation_of(values: Sequence[float | None]) -> float | None:
    """Sample standard deviation; None below two values, and where one is not defined."""
    defined = [value for value in values if value is not None]
    return statistics.stdev(defined) if len(defined) > 1 and len(defined) == len(values) else None


def _mean_task_norm(ranks: Sequence[RankEntry]) -> float | None:
    squares: dict[int, float] = {}
    for entry in ranks:
        squares[entry.task] = squares.get(entry.task, 0.0) + entry.delta_norm**2
    return statistics.fmean(math.sqrt(value) for value in squares.values()) if squares else None


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
        groups.setdefault(json.dumps(settings_of(run.config), sort_keys=True, default=str), []).append(run)
    for members in groups.values():
        seeds = [run.config["seed"] for run in members]
        if len(set(seeds)) < len(seeds):
            paths = ", ".join(str(run.path) for run in members)
            raise ValueError(
                f"{paths} repeat a seed with equal settings; the spread over seeds would be wrong. Give each once."
            )
    labels = labels_of([settings_of(members[0].config) for members in groups.values()])
    return [Group(label, tuple(members)) for label, members in zip(labels, groups.values())]


def sort_groups(groups: Sequence[Group], key: str) -> list[Group]:
    """By 'label', or by a figure of the own label space, best first and undefined last; 'given' leaves the order."""
    try:
        check_one_of("sort", key, SORT_KEYS)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if key == "given":
        return list(groups)
    if key == "label":
        return sorted(groups, key=lambda group: group.label)
    sign = 1.0 if key in LOWER_IS_BETTER else -1.0
    values = {group.label: group.mean("own", key) for group in groups}

    def place(group: Group) -> float:
        value = values[group.label]
        return math.inf if value is None else sign * value

    return sorted(groups, key=place)


def comparison_text(groups: Sequence[Group]) -> str:
    """Both accuracy tables of every group (up to eight; the page has the others'), then both tables of figures."""
    parts = []
    for group in groups if len(groups) <= 8 else ():
        tasks = group.runs[0].record.tasks
        seeds = ", ".join(map(str, group.seeds))
        mean = "mean over seeds" if len(group.runs) > 1 else "seed"
        for space in LABEL_SPACES:
            title = f"{group.label}, {mean} {seeds}, {SPACE_TITLES[space]}:"
            parts.append(f"{title}\n{accuracy_table(tasks, group.accuracies(space))}")
    for space in LABEL_SPACES:
        parts.append(f"{SPACE_TITLES[space].capitalize()}{spread_note(groups)}:\n{figures_table(groups, space)}")
    return "\n\n".join([*parts, READ_TOGETHER])


def figures_table(groups: Sequence[Group], space: str) -> str:
    """One row per group, one column per figure."""
    header = ["method", *(f"{title} {unit}".strip() for _, title, unit in FIGURES)]
    rows = [
        [group.label, *(number(group.mean(space, key), group.deviation(space, key)) for key, _, _ in FIGURES)]
        for group in groups
    ]
    return text_table(header, rows)


def spread_note(groups: Sequence[Group]) -> str:
    return ", mean ± s.d. over seeds" if any(len(group.runs) > 1 for group in groups) else ""


def comparison_json(groups: Sequence[Group]) -> dict[str, Any]:
    """The same, for programs: by group and label space, each figure's mean, sd and values, and the mean table."""
    return {
        "tasks": groups[0].runs[0].record.tasks,
        "groups": [
            {
                "label": group.label,
                "config": {key: group.runs[0].config[key] for key in ("benchmark", "method")},
                "seeds": group.seeds,
                "runs": [str(run.path) for run in group.runs],
                "held_out_curve": group.held_out(),
                "drift": _spread_json(group.drifts()),
            }
            | {space: _figures_json(group, space) for space in LABEL_SPACES}
            for group in groups
        ],
    }


def _figures_json(group: Group, space: str) -> dict[str, Any]:
    figures = {key: _spread_json(group.values(space, key)) for key, _, _ in FIGURES}
    return figures | {"accuracy": group.accuracies(space)}


def _spread_json(values: Sequence[float | None]) -> dict[str, Any]:
    return {"mean": mean_of(values), "sd": deviation_of(values), "values": list(values)}


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
