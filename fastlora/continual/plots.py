"""The plots of one run. Heat maps are in cividis and purple-orange, which colour-blind readers can tell apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from fastlora.continual import plot_texts
from fastlora.continual.drawing import COLOURS, STYLE, WIDTH, Plot, place_labels, plain, save, task_ticks
from fastlora.continual.module_plots import delta_heat_map, drift_curve, rank_heat_map, selection_plot
from fastlora.continual.saved_run import SavedRun
from fastlora.continual.tables import row_names

_SPACES = (("own", "own label space"), ("union", "union label space"))
_SIDE_BY_SIDE = 8  # data sets up to which two heat maps fit beside each other


def draw_all(run: SavedRun, folder: Path) -> list[Plot]:
    """Write every plot that the run has data for, in the order of reading."""
    plots = []
    with matplotlib.rc_context(STYLE):
        for name, kind in _KINDS.items():
            if kind.has_data(run):
                path = save(kind.draw(run), folder / f"{name}.png")
                title, describe, note = plot_texts.TEXTS[name]
                plots.append(Plot(title, path, describe(run), note))
    return plots


def accuracy_heat_maps(run: SavedRun) -> Figure:
    """Rows: before training, then after each task; columns: data sets. The frame marks the task just trained."""
    tasks, rows = run.record.tasks, len(run.record.own)
    stacked = len(tasks) > _SIDE_BY_SIDE
    width = max(0.6 * WIDTH, min(WIDTH, (2.2 if stacked else 4.4) + (1 if stacked else 2) * 0.62 * len(tasks)))
    height = 0.9 + 0.36 * rows
    figure = Figure(figsize=(width, 2 * height if stacked else height + 0.4), layout="constrained")
    panels = figure.subplots(2, 1) if stacked else figure.subplots(1, 2, sharey=True)
    for axes, (space, title) in zip(panels, _SPACES):
        values = np.array(getattr(run.record, space))
        image = axes.imshow(values, vmin=0, vmax=100, cmap="cividis", aspect="auto")
        for i, j in np.ndindex(values.shape):
            colour = "black" if values[i, j] > 55 else "white"
            axes.text(j, i, f"{values[i, j]:.0f}", ha="center", va="center", color=colour)
        for j in range(len(values) - 1):
            frame = matplotlib.patches.Rectangle(
                (j - 0.5, j + 0.5), 1, 1, fill=False, ec=COLOURS[1], lw=2, clip_on=False
            )
            axes.add_patch(frame)
        task_ticks(axes, tasks)
        axes.set_title(title)
        axes.set_yticks(range(rows), row_names(tasks, rows))
        plain(axes)
    if not stacked:
        panels[1].tick_params(labelleft=False)
    figure.colorbar(image, ax=panels, label="accuracy (%)", shrink=0.9, aspect=30)
    return figure


def forgetting_curves(run: SavedRun) -> Figure:
    """One panel per data set (and the held-out set): accuracy before training and after each task."""
    record, steps = run.record, range(len(run.record.own))
    names = [*record.tasks, *(["held-out set (never trained)"] if record.held_out else [])]
    columns = min(4, len(names))
    lines = math.ceil(len(names) / columns)
    figure = Figure(figsize=(2.5 * columns + 0.5, 1.9 * lines + 0.6), layout="constrained")
    panels = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    for j, (axes, name) in enumerate(zip(panels, names)):
        axes.set_title(name)
        axes.grid(True, axis="y")
        if j == len(record.tasks):
            axes.plot(steps, record.held_out, "o-", color=COLOURS[6], ms=4)
            continue
        axes.plot(steps, [row[j] for row in record.own], "o-", color=COLOURS[0], ms=4, label="own label space")
        axes.plot(steps, [row[j] for row in record.union], "s--", color=COLOURS[1], ms=3.5, label="union label space")
        axes.axvline(j + 1, color="#999999", lw=1, ls=":", zorder=0, label="trained here")
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    for axes in panels[len(names) - columns : len(names)]:  # the lowest panel of every column
        axes.tick_params(labelbottom=True)
    figure.supxlabel("tasks trained", fontsize=9)
    figure.supylabel("accuracy (%)", fontsize=9)
    every = 1 if len(steps) <= 8 else 2 if len(steps) <= 16 else 5
    panels[0].set(ylim=(0, 102), xticks=list(steps)[::every])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


def retention_scatter(run: SavedRun) -> Figure:
    """Plasticity against stability: accuracy of every data set when it was just trained, and what is left of it."""
    record = run.record
    done, last = record.finished_tasks, len(record.own) - 1
    figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
    panels = figure.subplots(1, 2)
    labels = []
    for axes, (space, title) in zip(panels, _SPACES):
        rows = getattr(record, space)
        axes.plot((0, 100), (0, 100), color="#aaaaaa", lw=1, zorder=0, label="nothing forgotten")
        points = [(rows[j + 1][j], rows[last][j]) for j in range(done)]
        for j, (x, y) in enumerate(points):
            axes.plot((rows[0][j], x, x), (rows[0][j], x, y), color="#cccccc", lw=0.8, zorder=1)
            hollow = {"mfc": "white", "mec": COLOURS[0], "ms": 4}
            axes.plot(rows[0][j], rows[0][j], "o", **hollow, label="" if j else "before any training")
            axes.plot(x, y, "o", color=COLOURS[0], ms=6, label="" if j else "a data set")
        texts, colours = list(record.tasks[:done]), [COLOURS[0]] * done
        if record.held_out:
            points.append((record.held_out[0], record.held_out[last]))
            axes.plot(*points[-1], "D", color=COLOURS[1], ms=6, label="held-out set, never trained")
            texts, colours = [*texts, "held-out"], [*colours, COLOURS[1]]
        axes.set(xlim=(0, 102), ylim=(0, 102), title=title, aspect="equal")
        axes.set(
            xlabel="plasticity: accuracy (%) right after its training", ylabel="stability: accuracy (%) at the end"
        )
        axes.grid(True)
        axes.set_axisbelow(True)
        labels.append((axes, points, texts, colours, [(rows[0][j], rows[0][j]) for j in range(done)]))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    for label in labels:
        place_labels(*label)
    return figure


def training_curves(run: SavedRun) -> Figure:
    """Loss, and where the method has them mean active rank and threshold, over all iterations of the stream."""
    known = {name for name in ("active_rank", "kappa") if any(row[name] is not None for row in run.log)}
    figure = Figure(figsize=(WIDTH, 4.6 if known else 2.6), layout="constrained")
    panels = figure.subplots(2 if known else 1, 1, sharex=True, squeeze=False)[:, 0]
    panels[0].set(ylabel="loss (nats)")
    curves = [(panels[0], "loss", {"color": COLOURS[0], "lw": 1.2})]
    if "active_rank" in known:
        curves.append((panels[1], "active_rank", {"color": COLOURS[2], "lw": 1.6}))
        panels[1].set_ylabel("mean active rank (line)", color=COLOURS[2])
    if "kappa" in known:
        kappa = panels[1].twinx() if "active_rank" in known else panels[1]
        curves.append((kappa, "kappa", {"color": COLOURS[1], "lw": 1.2, "ls": "--"}))
        kappa.set_ylabel("threshold κ (dashed)", color=COLOURS[1])
        kappa.spines["right"].set_visible(kappa is not panels[1])
    start = 0
    for task in dict.fromkeys(int(row["task"] or 0) for row in run.log):
        lines = [row for row in run.log if row["task"] == task]
        for axes, column, style in curves:
            x = [start + (row["iteration"] or 0) + 1 for row in lines]
            axes.plot(x, [math.nan if row[column] is None else row[column] for row in lines], **style)
        _name_task(panels, start, run.stages[task - 1], crowded=len(run.record.tasks) > 6)
        start += int(max(row["iteration"] or 0 for row in lines)) + 1
    for axes, _, _ in curves:
        axes.set_ylim(0, None)
    panels[-1].set(xlabel="iteration, all tasks", xlim=(-0.01 * start, 1.01 * start))
    return figure


def _name_task(panels: Any, start: float, name: str, crowded: bool) -> None:
    where = {"transform": panels[0].get_xaxis_transform(), "fontsize": 8, "rotation": 25 if crowded else 0}
    panels[0].text(start, 1.02, f" {name}", **where, rotation_mode="anchor")
    for axes in panels:
        axes.axvline(start, color="#cccccc", lw=0.8, zorder=0)


class _Kind(NamedTuple):
    draw: Callable[[SavedRun], Figure]
    has_data: Callable[[SavedRun], Any]


_KINDS = {
    "accuracy": _Kind(accuracy_heat_maps, lambda run: run.record.own),
    "forgetting": _Kind(forgetting_curves, lambda run: len(run.record.own) > 1),
    "retention": _Kind(retention_scatter, lambda run: len(run.record.own) > 1),
    "ranks": _Kind(rank_heat_map, lambda run: run.record.ranks),
    "selection": _Kind(selection_plot, lambda run: run.selection["comparisons"]),
    "delta_norm": _Kind(delta_heat_map, lambda run: run.record.ranks),
    "drift": _Kind(drift_curve, lambda run: any(run.record.drift)),
    "training": _Kind(training_curves, lambda run: run.log),
}
