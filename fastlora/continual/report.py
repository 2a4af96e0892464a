"""`report.html`: one file with every figure, table and plot of a run; it opens without a network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastlora.continual import page
from fastlora.continual.drawing import Plot
from fastlora.continual.module_plots import null_rank
from fastlora.continual.plots import draw_all
from fastlora.continual.saved_run import SavedRun, read_run
from fastlora.continual.tables import DEFINITIONS, FIGURES, READ_TOGETHER, SPACE_TITLES, duration, number, row_names
from fastlora.files import write_atomically


def write_report(path: str | os.PathLike[str]) -> Path:
    """Draw the plots of the run at `path` and write its page; also of an unfinished run.

    Returns:
        The page's path.
    Raises:
        FileNotFoundError, ValueError: no run, or one that cannot be read.
    """
    run = read_run(path)
    (run.path / "plots").mkdir(exist_ok=True)
    plots = draw_all(run, run.path / "plots")
    target = run.path / "report.html"
    write_atomically(target, _page(run, plots).encode())
    return target


def _page(run: SavedRun, plots: Sequence[Plot]) -> str:
    title = f"{run.label} on {run.manifest['benchmark']}, seed {run.manifest['seed']}"
    status = f'<span class="status {page.text(run.status)}">{page.text(run.status)}</span>'
    body = [f"<h1>{page.text(title)} {status}</h1>", _state(run)]
    if run.record.own:
        body += [_tiles(run), page.paragraph(_how_to_read(run)), _null_model(run)]
    body += [page.heading("Figures"), _figures(run), page.folded("What the figures mean", page.items(DEFINITIONS))]
    for plot in plots:
        body.append(page.figure(plot))
        if plot.path.name == "selection.png":
            body.append(_selection(run))
    for space, description in SPACE_TITLES.items():
        body += [
            page.heading(f"Accuracy (%), {description}"),
            _accuracies(run.record.tasks, getattr(run.record, space)),
        ]
    body += [page.heading("Time"), _time(run)]
    body += [page.heading("Configuration"), page.listing((run.path / "config.yaml").read_text())]
    manifest = page.listing((run.path / "manifest.json").read_text())
    body += [page.heading("Versions and hashes"), page.folded("manifest.json", manifest)]
    return page.document(title, body)


def _state(run: SavedRun) -> str:
    done, tasks = run.record.finished_tasks, len(run.record.tasks)
    text = f"{done} of {tasks} tasks in {duration(run.manifest['duration_seconds'])} on {run.manifest['device']}."
    if run.status == "finished":
        return page.paragraph(text, "note")
    if run.manifest.get("error"):
        text += f" Stopped by {run.manifest['error']}."
    if run.status == "running":
        text += " It is still running, or ended without a word."
    return page.paragraph(f"{text} Every figure here is that of the tasks that were finished.", "warning")


def _tiles(run: SavedRun) -> str:
    """Learning first and forgetting beside it."""
    metrics, expected = run.record.metrics(), null_rank(run)
    union = metrics["union"]
    figures = [
        (title, f"{number(metrics[key])} {unit}".strip(), f"union {number(union[key])}")
        for key, title, unit in FIGURES
        if key in ("learning", "forgetting", "last")
    ]
    if run.record.held_out:
        figures.append(
            ("Held-out", f"{number(metrics['held_out'])} %", f"before training {number(metrics['held_out_before'])}")
        )
    if run.record.ranks:
        small = f"of {max(entry.rank for entry in run.record.ranks)}"
        small += f", null model {expected:.2f}" if expected is not None else ""
        figures.append(("Mean rank", f"{metrics['mean_rank']:.2f}", small))
    return page.tiles(figures)


def _how_to_read(run: SavedRun) -> str:
    text = f"{READ_TOGETHER} Learning is the accuracy on a task right after its training"
    if run.record.own:
        zero_shot = sum(run.record.own[0]) / len(run.record.own[0])
        text += f" (before any training the data sets are at {zero_shot:.1f} % on average)"
    text += ", Forgetting what a task loses until the end, Last what is left of all tasks."
    if run.record.held_out:
        text += " The held-out set is never trained: what it loses is what adapting cost the pretrained model."
    return text


def _null_model(run: SavedRun) -> str:
    null = run.manifest.get("null_model")
    if not null:
        return ""
    text = (
        f"Each gate is shrunk by {null['total_shrink']:.2f} in all over a task: gates without any gradient would keep "
        f"{null['expected_rank']:.2f} of {run.config['method']['rank']} components (the null model)."
    )
    if run.record.ranks:
        kept = run.record.mean_rank()
        text += f" This run kept {kept:.2f}. As far as the two agree, the schedule chose how many, not the data."
    return page.paragraph(text)


def _figures(run: SavedRun) -> str:
    metrics = run.record.metrics()
    header = ["label space", *(f"{title} ({unit})" if unit else title for _, title, unit in FIGURES)]
    rows = [[space, *(number(values[key]) for key, _, _ in FIGURES)] for space, values in _both(metrics)]
    reasons = {key: reason for _, values in _both(metrics) for key, reason in values["reasons"].items()}
    shown = {key for key, _, _ in FIGURES}
    return page.table(header, rows) + page.items(
        list(dict.fromkeys(reason for key, reason in reasons.items() if key in shown))
    )


def _both(metrics: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [("own", metrics), ("union", metrics["union"])]


def _accuracies(tasks: Sequence[str], rows: Sequence[Sequence[float]]) -> str:
    names = row_names(tasks, len(rows))
    cells = [[name, *(f"{v:.1f}" for v in row)] for name, row in zip(names, rows)]
    return page.table(["", *tasks], cells, diagonal=True)


def _selection(run: SavedRun) -> str:
    comparisons = run.selection["comparisons"]
    towers = list(dict.fromkeys(tower for c in comparisons for tower in c.get("towers", {})))
    header = ["trainings that share", "Jaccard", "chance", *(f"{tower} (chance)" for tower in towers)]
    rows = [
        [
            c["name"],
            f"{c['jaccard']:.3f}",
            f"{c['chance']:.3f}",
            *("{:.3f} ({:.3f})".format(*c["towers"][t]) if t in c.get("towers", {}) else "-" for t in towers),
        ]
        for c in comparisons
    ]
    return page.table(header, rows)


def _time(run: SavedRun) -> str:
    rows, seconds, done = (
        [["whole run", duration(run.manifest["duration_seconds"])]],
        run.manifest.get("seconds"),
        run.record.finished_tasks,
    )
    if seconds:
        share = seconds["evaluate"] / max(seconds["train"] + seconds["evaluate"], 1e-9)
        rows += [
            ["training", duration(seconds["train"])],
            ["evaluation", f"{duration(seconds['evaluate'])} ({share:.0%} of both)"],
        ]
        if done:
            rows.append(["training, per finished task", duration(seconds["train"] / done)])
            rows.append(["evaluation, each", duration(seconds["evaluate"] / len(run.record.own))])
    return page.table(["", "time"], rows)
