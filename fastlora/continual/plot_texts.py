"""Words around the plots of a run: headings, how to read each, and what each shows for who cannot see it."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from fastlora.continual.module_plots import null_rank, short_name
from fastlora.continual.saved_run import SavedRun
from fastlora.continual.tables import number


def _accuracy(run: SavedRun) -> str:
    record = run.record
    columns = [
        f"{name} {record.own[0][j]:.0f} before, "
        + (f"{record.own[j + 1][j]:.0f} when trained, " if j < record.finished_tasks else "")
        + f"{record.own[-1][j]:.0f} now"
        for j, name in enumerate(record.tasks)
    ]
    return f"Two heat maps of accuracy in percent, own and union label space. Own: {'; '.join(columns)}."


def _forgetting(run: SavedRun) -> str:
    metrics = run.record.metrics()
    text = f"Forgetting is {number(metrics['forgetting'])} points in the own label space"
    text += f" and {number(metrics['union']['forgetting'])} in the union."
    if run.record.held_out:
        text += f" The held-out set goes from {run.record.held_out[0]:.1f} to {run.record.held_out[-1]:.1f} percent."
    return f"Accuracy of every data set before training and after each task. {text}"


def _retention(run: SavedRun) -> str:
    rows, done = run.record.own, run.record.finished_tasks
    kept = [f"{run.record.tasks[j]} {rows[j + 1][j]:.0f} and {rows[-1][j]:.0f}" for j in range(done)]
    return f"Scatter of accuracy right after training and at the end, in percent, own label space: {'; '.join(kept)}."


def _ranks(run: SavedRun) -> str:
    ranks, expected = run.record.ranks, null_rank(run)
    text = f"Heat maps of the components that each module kept after each task: {run.record.mean_rank():.2f} of "
    text += f"{max(entry.rank for entry in ranks)} on average"
    return text + (f"; the null model expects {expected:.2f}." if expected is not None else ".")


def _delta(run: SavedRun) -> str:
    largest = max(run.record.ranks, key=lambda entry: entry.delta_norm)
    mean = statistics.fmean(entry.delta_norm for entry in run.record.ranks)
    where = f"{short_name(largest.module)} in task {run.record.tasks[largest.task - 1]}"
    return f"Heat maps of the norm of every update: {mean:.3g} on average, largest {largest.delta_norm:.3g} at {where}."


def _drift(run: SavedRun) -> str:
    return f"Distance from the pretrained weights after each task: {', '.join(f'{v:.3g}' for v in run.record.drift)}."


def _selection(run: SavedRun) -> str:
    rows = [f"{c['name']} {c['jaccard']:.2f} (chance {c['chance']:.2f})" for c in run.selection["comparisons"]]
    return f"Overlap of the surviving components between two trainings: {'; '.join(rows)}."


def _training(run: SavedRun) -> str:
    losses = [row["loss"] for row in run.log if row["loss"] is not None]
    ends = f" The first logged loss is {losses[0]:.3g}, the last {losses[-1]:.3g}." if losses else ""
    return f"Loss, mean active rank and threshold over the iterations of all tasks.{ends}"


# name of the file -> heading, description, how to read it
TEXTS: dict[str, tuple[str, Callable[[SavedRun], str], str]] = {
    "accuracy": (
        "Accuracy on every data set after every task",
        _accuracy,
        "Down a column: one data set over time. The frame marks the task just trained; below it is what was kept, above "
        "it what training on other tasks did to a data set that had not been seen yet.",
    ),
    "forgetting": (
        "How each data set fares over the stream",
        _forgetting,
        "The dotted line is where the data set was trained. Own: among its own classes. Union: among the classes of all "
        "tasks, with the task unknown.",
    ),
    "retention": (
        "Plasticity against stability",
        _retention,
        "To the right: learned more. On the diagonal: nothing forgotten since; the drop from it is the forgetting. The "
        "hollow circle is the accuracy before any training: a point on its circle learned nothing and lost nothing.",
    ),
    "ranks": (
        "Components that every module kept",
        _ranks,
        "One panel per task, layers down, modules across. Where a null model is drawn, white is what gates without any "
        "gradient would keep: close to it the schedule decides how many components survive, and the data little.",
    ),
    "selection": (
        "Who chooses the components",
        _selection,
        "Two trainings that differ in one thing: how many of their surviving components are the same? Where other data "
        "leave the choice as it is and other gates change it to chance, the draw of the gates chose.",
    ),
    "delta_norm": (
        "Size of every module's update",
        _delta,
        "What each task added to each weight. Large updates of few modules are where the method learns, and where it may "
        "overwrite.",
    ),
    "drift": (
        "Drift from the pretrained weights",
        _drift,
        "Above the dashed line the tasks pull the same way, below it later tasks undo earlier ones.",
    ),
    "training": (
        "Training",
        _training,
        "Loss above; below it the mean number of active components (line) and the threshold that removes them (dashed).",
    ),
}
