"""Plots of the adapters: what every module kept and how far it moved, by layer, module and task; drift; selection."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from fastlora.continual.drawing import COLOURS, WIDTH, plain, task_ticks
from fastlora.continual.saved_run import SavedRun

_TASKS_A_BAND = 6
_CELL = 0.2  # inches, height of a layer's row
_TOWERS = {"visual.transformer": "vision", "transformer": "text", "text.transformer": "text"}


class Place(NamedTuple):
    """Where a module sits: 'visual.transformer.resblocks.0.attn.q' is ('vision', '0', 'attn.q')."""

    tower: str
    layer: str
    part: str


def place_of(module: str) -> Place:
    """Split at the first number; a name without one is its parent, no layer, and its last part."""
    parts = module.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is None:
        return Place(".".join(parts[:-1]), "", parts[-1])
    tower = ".".join(part for part in parts[:at] if part != "resblocks")
    return Place(_TOWERS.get(tower, tower), parts[at], ".".join(parts[at + 1 :]))


def short_name(module: str) -> str:
    """'visual.transformer.resblocks.0.attn.q' -> 'vision 0 q'."""
    tower, layer, part = place_of(module)
    return f"{tower} {layer} {part.rpartition('.')[2]}" if layer else module


def rank_heat_map(run: SavedRun) -> Figure:
    """Kept components per layer, module and task, coloured by the distance from what gates without gradient keep."""
    expected, values = null_rank(run), _values(run, "active_rank")
    top = max(1, *(max(entry.rank, entry.active_rank) for entry in run.record.ranks))
    if expected is None:
        label, colours = "components kept", {"cmap": "cividis", "norm": Normalize(0, top)}
    else:
        reach = max(abs(top - expected), expected)  # one component more or less has one shade anywhere
        reach = min(reach, max(float(np.nanmax(np.abs(values - expected))), 1.0))
        label = f"components kept\n(line, white: null model, {expected:.2f})"
        colours = {"cmap": "PuOr_r", "norm": Normalize(expected - reach, expected + reach)}
    figure, means, bar = _heat_map(run, values, label, colours, numbers=True)
    if expected is not None:
        bar.ax.axhline(expected, color="black", lw=2)
        bar.ax.set_ylim(max(0, expected - reach), min(top, expected + reach))
    _task_means(means, run, values, "mean components kept", expected)
    means.set_ylim(0, 1.08 * top)
    return figure


def delta_heat_map(run: SavedRun) -> Figure:
    """Frobenius norm of what each task added to each weight."""
    values = _values(run, "delta_norm")
    colours = {"cmap": "cividis", "norm": Normalize(0, max(float(np.nanmax(values)), 1e-12))}
    figure, means, _ = _heat_map(run, values, "‖ΔW‖ (Frobenius norm)", colours, numbers=False)
    _task_means(means, run, values, "mean ‖ΔW‖", None)
    means.set_ylim(0, None)
    return figure


def drift_curve(run: SavedRun) -> Figure:
    """Distance of all weights from the pretrained ones, beside what updates at right angles would have added up to."""
    drift = run.record.drift
    figure = Figure(figsize=(0.62 * WIDTH, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(len(drift)), drift, "o-", color=COLOURS[0], label="drift ‖θ − θ₀‖ (Frobenius norm)")
    if run.record.ranks:
        steps = np.nansum(_values(run, "delta_norm") ** 2, axis=0)  # squared norm of each task's update
        right_angles = np.sqrt(np.concatenate([[0.0], np.cumsum(steps)]))[: len(drift)]
        label = "the same ‖ΔW‖, every task at right angles to the others"
        axes.plot(range(len(right_angles)), right_angles, "--", color=COLOURS[1], lw=1.2, label=label)
    axes.set(ylabel="distance from the pretrained weights", xlim=(-0.2, len(drift) - 0.8), ylim=(0, None))
    task_ticks(axes, ["before", *run.record.tasks][: len(drift)])
    axes.grid(True, axis="y")
    axes.legend(loc="lower right")
    return figure


def selection_plot(run: SavedRun) -> Figure:
    """Per comparison the overlap of the surviving components, one dot a module, against that of a random choice."""
    comparisons = run.selection["comparisons"]
    figure = Figure(figsize=(0.8 * WIDTH, 1.1 + 0.55 * len(comparisons)), layout="constrained")
    axes = figure.subplots()
    for row, comparison in enumerate(comparisons):
        dots = [jaccard for jaccard, _ in comparison.get("per_module", {}).values()]
        heights = row + 0.22 * np.sin(2.4 * np.arange(len(dots)))  # spread without chance: the plot repeats exactly
        chance, ends = [comparison["chance"]] * 2, (row - 0.38, row + 0.38)
        axes.plot(dots, heights, ".", color=COLOURS[5], ms=4, label="" if row else "a module")
        axes.plot(chance, ends, color=COLOURS[1], lw=2, ls="--", label="" if row else "chance")
        axes.plot(comparison["jaccard"], row, "D", color=COLOURS[0], ms=7, label="" if row else "all modules")
    axes.set_yticks(range(len(comparisons)), [comparison["name"] for comparison in comparisons])
    axes.set(xlim=(-0.02, 1.02), ylim=(len(comparisons) - 0.4, -0.6))
    axes.set_xlabel("Jaccard overlap of the surviving components")
    axes.grid(True, axis="x")
    axes.set_axisbelow(True)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def null_rank(run: SavedRun) -> float | None:
    """Components that a gate without any gradient would keep; None where the method has no such expectation."""
    return (run.manifest.get("null_model") or {}).get("expected_rank")


def _heat_map(
    run: SavedRun, values: np.ndarray, label: str, colours: dict[str, Any], numbers: bool
) -> tuple[Figure, Any, Any]:
    """One panel per tower and task, layers down, modules across; below them the axes for the means over modules."""
    towers, tasks = _towers(_modules(run)), values.shape[1]
    columns = min(_TASKS_A_BAND, tasks)
    bands = math.ceil(tasks / columns)
    heights = [_CELL * len(tower.layers) + 0.1 for tower in towers] * bands
    widest, same = max(len(tower.parts) for tower in towers), len({tuple(tower.parts) for tower in towers}) == 1
    width = max(0.6 * WIDTH, 1.6 + columns * max(1.0, min(1.45, 0.24 * widest)))
    figure = Figure(figsize=(width, sum(heights) + 0.75 * bands + 2.7), layout="constrained")
    grid = figure.add_gridspec(len(heights) + 1, columns, height_ratios=[*heights, 1.7])
    panels = []
    for task in range(tasks):
        for k, tower in enumerate(towers):
            row = (task // columns) * len(towers) + k
            axes = figure.add_subplot(grid[row, task % columns])
            image = axes.imshow(tower.cells(values[:, task]), aspect="auto", interpolation="nearest", **colours)
            if numbers:
                _write_numbers(axes, image)
            _label_panel(axes, tower, first=task % columns == 0, named=k == len(towers) - 1 or not same)
            axes.set_title(run.stages[task] if k == 0 else "", fontsize=9)
            panels.append(axes)
    bar = figure.colorbar(image, ax=panels, label=label, aspect=30, shrink=min(1.0, 5.0 / sum(heights)))
    return figure, figure.add_subplot(grid[-1, :]), bar


class _Tower(NamedTuple):
    name: str
    layers: list[str]
    parts: list[str]
    rows: dict[tuple[str, str], int]  # (layer, part) -> index of the module

    def cells(self, values: np.ndarray) -> np.ndarray:
        """[layers, parts]; NaN where a layer has no such module."""
        cells = np.full((len(self.layers), len(self.parts)), np.nan)
        for (layer, part), module in self.rows.items():
            cells[self.layers.index(layer), self.parts.index(part)] = values[module]
        return cells


def _towers(modules: Sequence[str]) -> list[_Tower]:
    towers: dict[str, dict[tuple[str, str], int]] = {}
    for i, module in enumerate(modules):
        tower, layer, part = place_of(module)
        towers.setdefault(tower, {})[layer, part] = i
    return [
        _Tower(
            name, list(dict.fromkeys(layer for layer, _ in rows)), list(dict.fromkeys(part for _, part in rows)), rows
        )
        for name, rows in towers.items()
    ]


def _label_panel(axes: Any, tower: _Tower, first: bool, named: bool) -> None:
    short = [part.rpartition(".")[2] for part in tower.parts]
    names = short if len(set(short)) == len(short) else tower.parts
    axes.set_xticks(range(len(names)), names if named else [""] * len(names), rotation=90, fontsize=7)
    axes.set_yticks(range(len(tower.layers)), tower.layers if first else [""] * len(tower.layers), fontsize=7)
    if first:
        axes.set_ylabel(f"{tower.name}, layer" if tower.layers != [""] else tower.name)
    plain(axes)


def _write_numbers(axes: Any, image: Any) -> None:
    values = image.get_array()
    for (row, column), value in np.ndenumerate(values):
        if value is not np.ma.masked and np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            colour = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=6.5, color=colour)


def _task_means(axes: Any, run: SavedRun, values: np.ndarray, label: str, expected: float | None) -> None:
    """Mean over the modules per task, with the spread between modules."""
    tasks = range(values.shape[1])
    mean, spread = np.nanmean(values, axis=0), np.nanstd(values, axis=0)
    axes.errorbar(tasks, mean, spread, fmt="o", color=COLOURS[0], capsize=3, label="mean ± s.d. over modules")
    if expected is not None:
        axes.axhline(expected, color=COLOURS[1], ls="--", label=f"null model: {expected:.2f}")
    task_ticks(axes, run.stages[: len(tasks)])
    axes.set(ylabel=label, xlim=(-0.5, len(tasks) - 0.5))
    axes.grid(True, axis="y")
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, borderaxespad=0.2)


def _modules(run: SavedRun) -> list[str]:
    return list(dict.fromkeys(entry.module for entry in run.record.ranks))


def _values(run: SavedRun, field: str) -> np.ndarray:
    """[modules, finished tasks]; NaN where a task did not adapt a module."""
    modules = {name: i for i, name in enumerate(_modules(run))}
    values = np.full((len(modules), max(entry.task for entry in run.record.ranks)), np.nan)
    for entry in run.record.ranks:
        values[modules[entry.module], entry.task - 1] = getattr(entry, field)
    return values
