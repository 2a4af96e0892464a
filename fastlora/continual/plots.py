"""The plots of one run, in colours safe for colour-blind readers: cividis, purple-orange, and Okabe-Ito's eight."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastlora.continual.saved_run import SavedRun
from fastlora.continual.tables import row_names
from fastlora.files import write_atomically

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": "#e5e5e5",
    "legend.frameon": False,
}
_SPACES = (("own", "own label space"), ("union", "union label space"))


def draw_all(run: SavedRun, folder: Path) -> dict[str, Path]:
    """Write every plot that the run has data for; title -> file, in the order of reading."""
    makers = {
        "Accuracy on every data set after every task (framed: the task just trained)": (
            "accuracy",
            accuracy_heat_maps,
            bool(run.record.own),
        ),
        "How each data set fares over the stream": ("forgetting", forgetting_curves, len(run.record.own) > 1),
        "Components that every module kept": ("ranks", rank_heat_map, bool(run.record.ranks)),
        "Size of every module's update": ("delta_norm", delta_heat_map, bool(run.record.ranks)),
        "Training": ("training", training_curves, bool(run.log)),
    }
    files = {}
    with matplotlib.rc_context(STYLE):
        for title, (name, maker, has_data) in makers.items():
            if has_data:
                files[title] = save(maker(run), folder / f"{name}.png")
    return files


def save(figure: Figure, path: Path) -> Path:
    """Render, then write the file in one step."""
    FigureCanvasAgg(figure)
    image = io.BytesIO()
    figure.savefig(image, dpi=130, bbox_inches="tight", format="png")
    write_atomically(path, image.getvalue())
    return path


def accuracy_heat_maps(run: SavedRun) -> Figure:
    """Rows: before training, then after each task; columns: data sets. The frame marks the task just trained."""
    tasks = run.record.tasks
    figure = Figure(figsize=(4.4 + 1.15 * len(tasks), 1.6 + 0.42 * len(run.record.own)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (space, title) in zip(panels, _SPACES):
        values = np.array(getattr(run.record, space))
        image = axes.imshow(values, vmin=0, vmax=100, cmap="cividis", aspect="auto")
        for i, j in np.ndindex(values.shape):
            axes.text(
                j, i, f"{values[i, j]:.0f}", ha="center", va="center", color="black" if values[i, j] > 55 else "white"
            )
        for j in range(len(values) - 1):
            axes.add_patch(
                matplotlib.patches.Rectangle((j - 0.5, j + 0.5), 1, 1, fill=False, ec="#D55E00", lw=2, clip_on=False)
            )
        axes.set_xticks(range(len(tasks)), tasks, rotation=35, ha="right", rotation_mode="anchor")
        axes.set(title=title, xlabel="data set")
        _plain(axes)
    panels[0].set_yticks(range(len(run.record.own)), row_names(tasks, len(run.record.own)))
    figure.colorbar(image, ax=panels, label="accuracy (%)", shrink=0.9)
    return figure


def forgetting_curves(run: SavedRun) -> Figure:
    """One panel per data set (and the held-out set): accuracy before training and after each task."""
    record, steps = run.record, range(len(run.record.own))
    names = [*record.tasks, *(["held-out set (never trained)"] if record.held_out else [])]
    columns = min(4, len(names))
    lines = math.ceil(len(names) / columns)
    figure = Figure(figsize=(2.6 * columns + 0.6, 2.1 * lines + 0.6), layout="constrained")
    panels = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    for j, (axes, name) in enumerate(zip(panels, names)):
        axes.set_title(name)
        axes.grid(True, axis="y")
        if j == len(record.tasks):
            axes.plot(steps, record.held_out, "o-", color=OKABE_ITO[6], ms=4)
            continue
        axes.plot(steps, [row[j] for row in record.own], "o-", color=OKABE_ITO[0], ms=4, label="own label space")
        axes.plot(steps, [row[j] for row in record.union], "s--", color=OKABE_ITO[1], ms=3.5, label="union label space")
        axes.axvline(j + 1, color="#999999", lw=1, ls=":", zorder=0, label="trained here")
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    for axes in panels[len(names) - columns : len(names)]:  # the lowest panel of every column
        axes.tick_params(labelbottom=True)
    figure.supxlabel("tasks trained")
    figure.supylabel("accuracy (%)")
    panels[0].set(ylim=(0, 102), xticks=list(steps))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


def rank_heat_map(run: SavedRun) -> Figure:
    """Kept components per module and task, coloured by the distance from what gates without any gradient would keep."""
    expected = _null_rank(run)
    top = max(entry.rank for entry in run.record.ranks)
    label, scale = "components kept", {"cmap": "cividis", "norm": matplotlib.colors.Normalize(0, top)}
    if expected is not None:
        label = f"components kept (black line, white cells: null model, {expected:.2f})"
        middle = min(max(expected, 1e-6), top - 1e-6)
        scale = {"cmap": "PuOr_r", "norm": matplotlib.colors.TwoSlopeNorm(middle, 0, top)}
    figure, axes, bar = _module_heat_map(run, _by_module(run, "active_rank"), label, scale)
    if expected is not None:
        bar.ax.axhline(expected, color="black", lw=2)
    _task_means(axes, run, "active_rank", "mean kept rank", expected)
    axes.set_ylim(0, 1.05 * top)
    return figure


def delta_heat_map(run: SavedRun) -> Figure:
    """Frobenius norm of what each task added to each weight."""
    values = _by_module(run, "delta_norm")
    scale = {"cmap": "cividis", "norm": matplotlib.colors.Normalize(0, max(values.max(), 1e-12))}
    figure, axes, _ = _module_heat_map(run, values, "‖ΔW‖ (Frobenius norm)", scale)
    _task_means(axes, run, "delta_norm", "mean ‖ΔW‖ (Frobenius norm)", None)
    return figure


def training_curves(run: SavedRun) -> Figure:
    """Loss, mean active rank and threshold over all iterations of the stream."""
    per_task, done = run.config["method"]["iterations"], int(run.log[-1]["task"] or 0)
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    kappa = bottom.twinx()
    for task in range(1, done + 1):
        lines = [row for row in run.log if row["task"] == task]
        x = [(task - 1) * per_task + row["iteration"] + 1 for row in lines]
        top.plot(x, [row["loss"] for row in lines], color=OKABE_ITO[0], lw=1.2)
        bottom.plot(x, [row["active_rank"] for row in lines], color=OKABE_ITO[2], lw=1.6)
        kappa.plot(x, [row["kappa"] for row in lines], color=OKABE_ITO[1], lw=1.2, ls="--")
        top.text(
            (task - 1) * per_task,
            1.02,
            f" {run.record.tasks[task - 1]}",
            transform=top.get_xaxis_transform(),
            fontsize=8,
        )
        for axes in (top, bottom):
            axes.axvline((task - 1) * per_task, color="#cccccc", lw=0.8, zorder=0)
    top.set(ylabel="loss (nats)", ylim=(0, None))
    bottom.set(xlabel="iteration, all tasks", ylim=(0, None))
    bottom.set_ylabel("mean active rank (line)", color=OKABE_ITO[2])
    kappa.set(ylim=(0, None))
    kappa.set_ylabel("threshold κ (dashed)", color=OKABE_ITO[1])
    kappa.spines["right"].set_visible(True)
    return figure


def _module_heat_map(run: SavedRun, values: np.ndarray, label: str, scale: dict[str, Any]) -> tuple[Figure, Any, Any]:
    modules = _modules(run)
    figure = Figure(figsize=(10.5, 1.6 + min(0.15 * len(modules), 16)), layout="constrained")
    axes, means = figure.subplots(1, 2, width_ratios=(3, 2))
    image = axes.imshow(values, aspect="auto", interpolation="nearest", **scale)
    axes.set_yticks(range(len(modules)), map(short_name, modules), fontsize=7 if len(modules) <= 90 else 5)
    axes.set_xticks(
        range(values.shape[1]), run.record.tasks[: values.shape[1]], rotation=35, ha="right", rotation_mode="anchor"
    )
    axes.set(xlabel="task", ylabel="module")
    for row in range(1, len(modules)):
        here, above = short_name(modules[row]).split(), short_name(modules[row - 1]).split()
        if here[:2] != above[:2]:  # another block; a heavier line where the other tower starts
            axes.axhline(row - 0.5, color="black", lw=2.0 if here[0] != above[0] else 0.5)
    _plain(axes)
    return figure, means, figure.colorbar(image, ax=axes, label=label, shrink=0.9)


def _task_means(axes: Any, run: SavedRun, field: str, label: str, expected: float | None) -> None:
    """Mean over the modules per task, with the spread between modules."""
    values = _by_module(run, field)
    tasks = range(1, values.shape[1] + 1)
    axes.errorbar(
        tasks, values.mean(0), values.std(0), fmt="o", color=OKABE_ITO[0], capsize=3, label="mean ± s.d. over modules"
    )
    if expected is not None:
        axes.axhline(expected, color=OKABE_ITO[1], ls="--", label=f"null model: {expected:.2f}")
    axes.set_xticks(list(tasks), run.record.tasks[: len(tasks)], rotation=35, ha="right", rotation_mode="anchor")
    axes.set(ylabel=label, xlabel="task", ylim=(0, None), xlim=(0.5, len(tasks) + 0.5))
    axes.grid(True, axis="y")
    axes.legend(loc="lower right")


def short_name(module: str) -> str:
    """'visual.transformer.resblocks.0.attn.q' -> 'vision 0 q'."""
    parts = module.split(".")
    if "resblocks" not in parts:
        return module
    layer = parts[parts.index("resblocks") + 1]
    return f"{'vision' if parts[0] == 'visual' else 'text'} {layer} {parts[-1]}"


def _modules(run: SavedRun) -> list[str]:
    return list(dict.fromkeys(entry.module for entry in run.record.ranks))


def _by_module(run: SavedRun, field: str) -> np.ndarray:
    """[modules, finished tasks]."""
    modules = {name: i for i, name in enumerate(_modules(run))}
    values = np.full((len(modules), max(entry.task for entry in run.record.ranks)), np.nan)
    for entry in run.record.ranks:
        values[modules[entry.module], entry.task - 1] = getattr(entry, field)
    return values


def _null_rank(run: SavedRun) -> float | None:
    return (run.manifest.get("null_model") or {}).get("expected_rank")


def _plain(axes: Any) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
