"""`compare.html`: methods side by side in one file, with its plots as PNGs beside it."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import matplotlib

from fastlora.continual import page
from fastlora.continual.compare import Group, deviation_of, mean_of, spread_note
from fastlora.continual.compare_plot import MOST_BARS, bars_plot, draw_comparison, held_out_plot
from fastlora.continual.config import UsageError
from fastlora.continual.drawing import STYLE, Plot, save
from fastlora.continual.frontier import AXES, frontier_groups, frontier_plot
from fastlora.continual.group_labels import settings_of
from fastlora.continual.module_plots import null_rank, place_of
from fastlora.continual.record import LABEL_SPACES, RankEntry
from fastlora.continual.tables import DEFINITIONS, FIGURES, READ_TOGETHER, SPACE_TITLES, duration, number, row_names
from fastlora.files import write_atomically

_OTHER_FILES = (".htm", ".jpg", ".jpeg", ".svg", ".pdf", ".csv", ".json", ".md", ".txt")


def write_comparison(groups: Sequence[Group], out: Path) -> Path:
    """One plot where `out` ends in .png, one page where it ends in .html, else both, compare.html among its plots.

    Returns:
        The file to open; a directory is made where it is missing.
    Raises:
        UsageError: `out` ends like another kind of file.
    """
    if out.suffix == ".png":
        return draw_comparison(groups, out)
    if out.suffix == ".html":
        with tempfile.TemporaryDirectory() as plots:
            return _write(groups, Path(plots), out)
    if out.suffix in _OTHER_FILES and not out.is_dir():
        raise UsageError(f"--out is {out}; accepted: FILE.png, FILE.html, or a directory, in which both are written.")
    out.mkdir(parents=True, exist_ok=True)
    return _write(groups, out, out / "compare.html")


def _write(groups: Sequence[Group], plots: Path, target: Path) -> Path:
    write_atomically(target, _page(groups, _draw(groups, plots)).encode())
    return target


def _draw(groups: Sequence[Group], folder: Path) -> dict[str, Plot]:
    plots = {}
    with matplotlib.rc_context(STYLE):
        for space in LABEL_SPACES:
            path = save(frontier_plot(groups, space), folder / f"frontier_{space}.png")
            plots[f"frontier_{space}"] = Plot(
                f"The frontier, {space} label space", path, _frontier_words(groups, space), _FRONTIER_NOTE
            )
            if len(groups) <= MOST_BARS:
                path = save(bars_plot(groups, space), folder / f"bars_{space}.png")
                alt = "Bars of the figures in the table of this label space."
                plots[f"bars_{space}"] = Plot(f"Figures, {space} label space", path, alt, _BARS_NOTE)
        if any(group.held_out() for group in groups):
            path = save(held_out_plot(groups), folder / "held_out.png")
            ends = ", ".join(f"{g.label} {g.held_out()[-1]:.1f}" for g in groups if g.held_out())
            alt = f"Held-out accuracy in percent over the stream. At the end: {ends}."
            plots["held_out"] = Plot("What is left of what pretraining knew", path, alt, _HELD_OUT_NOTE)
    return plots


_FRONTIER_NOTE = (
    "One point per method and setting, with its spread over seeds. The line joins those that no other beats in both; "
    "whoever is below it learns less and keeps no more. Dotted: the accuracy before any training."
)
_BARS_NOTE = "Learning and Forgetting belong together; Last holds both."
_HELD_OUT_NOTE = "Accuracy on data that no task trains, mean over seeds."


def _page(groups: Sequence[Group], plots: dict[str, Plot]) -> str:
    first = groups[0].runs[0]
    title = f"{len(groups)} {'settings' if len(groups) > 1 else 'setting'} on {first.manifest['benchmark']}"
    runs = sum(len(group.runs) for group in groups)
    lead = f"{runs} runs of {len(first.record.tasks)} tasks; runs that differ in their seed alone are taken together."
    body = [f"<h1>{page.text(title)}</h1>", page.paragraph(lead, "note"), page.paragraph(_how_to_read(groups))]
    for space in LABEL_SPACES:
        body.append(page.heading(f"{SPACE_TITLES[space].capitalize()}{spread_note(groups)}"))
        body.append(_figures(groups, space))
        body += [page.figure(plots[name]) for name in (f"frontier_{space}", f"bars_{space}") if name in plots]
    body.append(page.folded("What the figures mean", page.items(DEFINITIONS)))
    if "held_out" in plots:
        body.append(page.figure(plots["held_out"]))
    body += [page.heading("What the adapters kept and moved"), _adapters(groups)]
    body += [page.heading("Accuracy tables"), *(_accuracies(group) for group in groups)]
    body += [page.heading("Settings that differ"), _settings(groups)]
    body += [page.heading("Runs"), page.folded("seed, time and directory of every run", _runs(groups))]
    return page.document(title, body)


def _how_to_read(groups: Sequence[Group]) -> str:
    text = f"{READ_TOGETHER} In the frontier plots, look for who learns more at the same forgetting"
    text += ", and who keeps more of the held-out set at the same learning."
    null = [group for group in groups if null_rank(group.runs[0]) is not None]
    if null:
        text += " Where the kept rank equals the null model's, the schedule chose how many components survive."
    if all(len(group.runs) == 1 for group in groups):
        text += " One seed per setting: a difference of few points may be chance."
    return text


def _frontier_words(groups: Sequence[Group], space: str) -> str:
    parts = []
    for key, label, _ in AXES:
        names = ", ".join(group.label for group in frontier_groups(groups, space, key)) or "none"
        parts.append(f"on the frontier of learning and {label.partition(' (')[0].lower()}: {names}")
    return f"Scatter of learning against forgetting and against held-out accuracy; {'; '.join(parts)}."


def _figures(groups: Sequence[Group], space: str) -> str:
    header = ["method", "seeds", *(f"{title} ({unit})" if unit else title for _, title, unit in FIGURES)]
    rows = [
        [
            group.label,
            str(len(group.runs)),
            *(number(group.mean(space, key), group.deviation(space, key)) for key, _, _ in FIGURES),
        ]
        for group in groups
    ]
    return page.table(header, rows)


def _adapters(groups: Sequence[Group]) -> str:
    """Kept rank by tower and by module, beside the null model; size of an update; drift."""
    entries = [entry for group in groups for run in group.runs for entry in run.record.ranks]
    if not entries and not any(run.record.drift for group in groups for run in group.runs):
        return page.paragraph("No run has adapters or a measured drift.", "note")
    places = {module: place_of(module) for module in dict.fromkeys(entry.module for entry in entries)}
    towers = list(dict.fromkeys(place.tower for place in places.values()))
    parts = list(dict.fromkeys(place.part for place in places.values()))

    def is_in(what: str, value: str, entry: RankEntry) -> bool:
        return getattr(places[entry.module], what) == value

    header = ["method", "rank", "null model", "kept", *towers, *(part.rpartition(".")[2] for part in parts)]
    rows = []
    for group in groups:
        ranks = [entry.rank for run in group.runs for entry in run.record.ranks]
        null = null_rank(group.runs[0])
        kept = [
            group.ranks(),
            *(group.ranks(functools.partial(is_in, "tower", tower)) for tower in towers),
            *(group.ranks(functools.partial(is_in, "part", part)) for part in parts),
        ]
        cells = [str(max(ranks)) if ranks else "-", "-" if null is None else f"{null:.2f}"]
        cells += [number(mean_of(values), deviation_of(values)) for values in kept[:1]]
        cells += [number(mean_of(values)) for values in kept[1:]]
        cells += [number(mean_of(v), deviation_of(v), 2) for v in (group.delta_norms(), group.drifts())]
        rows.append([group.label, *cells])
    return page.table([*header, "‖ΔW‖ of a task", "drift at the end"], rows)


def _accuracies(group: Group) -> str:
    tasks = group.runs[0].record.tasks
    tables = []
    for space in LABEL_SPACES:
        accuracies = group.accuracies(space)
        names = row_names(tasks, len(accuracies))
        cells = [[name, *(f"{value:.1f}" for value in row)] for name, row in zip(names, accuracies)]
        tables += [page.paragraph(SPACE_TITLES[space], "note"), page.table(["", *tasks], cells, diagonal=True)]
    return page.folded(f"{group.label}, {len(group.runs)} seed{'s' * (len(group.runs) > 1)}", "".join(tables))


def _settings(groups: Sequence[Group]) -> str:
    settings = [settings_of(group.runs[0].config) for group in groups]
    keys = list(dict.fromkeys(key for mine in settings for key in mine))
    differing = [key for key in keys if key != "name" and len({str(mine.get(key)) for mine in settings}) > 1]
    rows = [[group.label, *(str(mine.get(key, "-")) for key in differing)] for group, mine in zip(groups, settings)]
    return page.table(["method", *differing], rows) if differing else page.paragraph("None.", "note")


def _runs(groups: Sequence[Group]) -> str:
    rows = [
        [group.label, str(run.config["seed"]), duration(run.manifest["duration_seconds"]), str(run.path)]
        for group in groups
        for run in group.runs
    ]
    return page.table(["method", "seed", "time", "directory"], rows)
