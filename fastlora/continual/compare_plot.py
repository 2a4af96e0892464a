"""Plots of a comparison: what was learned, kept and forgotten, and what is left of what pretraining knew, per method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from fastlora.continual.compare import Group
from fastlora.continual.drawing import COLOURS, STYLE, WIDTH, place_labels, save, spread
from fastlora.continual.frontier import AXES, draw_frontier, styles

_BARS = (
    ("learning", "Learning\n(higher is better)"),
    ("forgetting", "Forgetting\n(lower is better)"),
    ("last", "Last\n(higher)"),
    ("transfer", "Transfer\n(higher)"),
)
_HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
MOST_BARS = len(COLOURS)


def draw_comparison(groups: Sequence[Group], path: Path) -> Path:
    """One PNG at `path`: bars (up to eight groups), held-out accuracy over the stream, and both frontiers."""
    with matplotlib.rc_context(STYLE):
        few = len(groups) <= MOST_BARS
        heights = (4.3, 4.3) if few else (max(4.0, 1.5 + 0.17 * len(groups)), 6.2)
        figure = Figure(figsize=(11, sum(heights)), layout="constrained")
        grid = figure.add_gridspec(2, 1, height_ratios=heights)
        upper, lower = grid[0], grid[1]
        if few:
            cells = upper.subgridspec(1, 2, width_ratios=(3, 2))
            draw_bars(figure.add_subplot(cells[0]), groups, "own")
            draw_held_out(figure.add_subplot(cells[1]), groups)
        else:
            draw_held_out(figure.add_subplot(upper), groups)
        below = lower.subgridspec(1, 2)
        panels = [figure.add_subplot(below[0]), figure.add_subplot(below[1])]
        places = [draw_frontier(axes, groups, "own", key) for axes, (key, _, _) in zip(panels, AXES)]
        for place in places:
            place_labels(*place)
        return save(figure, path)


def bars_plot(groups: Sequence[Group], space: str) -> Figure:
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    draw_bars(figure.subplots(), groups, space)
    return figure


def held_out_plot(groups: Sequence[Group]) -> Figure:
    figure = Figure(figsize=(WIDTH, max(3.8, 1.5 + 0.17 * len(groups))), layout="constrained")
    draw_held_out(figure.subplots(), groups)
    return figure


def draw_bars(axes: Any, groups: Sequence[Group], space: str) -> None:
    """Bars of the figures with their spread over seeds."""
    for i, group in enumerate(groups):
        _bars_of(axes, group, i, len(groups), space)
    axes.set_xticks(range(len(_BARS)), [title for _, title in _BARS])
    axes.set_ylabel(f"percent; forgetting in points ({space} label space)")
    axes.axhline(0, color="black", lw=0.8)
    axes.grid(True, axis="y")
    axes.set_axisbelow(True)
    columns = min(len(groups), 4)
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=columns, borderaxespad=0.2)


def draw_held_out(axes: Any, groups: Sequence[Group]) -> None:
    """Held-out accuracy over the stream, every curve named at its end."""
    tasks = groups[0].runs[0].record.tasks
    shown = [(group, style) for group, style in zip(groups, styles(groups)) if group.held_out()]
    for group, (colour, marker) in shown:
        axes.plot(group.held_out(), f"{marker}-", color=colour, ms=4, lw=1.2)
    axes.set(xlabel="tasks trained", ylabel="held-out accuracy (%)")
    if len(groups) <= MOST_BARS:
        axes.set_ylim(0, None)
    axes.set_xticks(range(len(tasks) + 1))
    axes.grid(True, axis="y")
    axes.set_axisbelow(True)
    if not shown:
        axes.text(0.5, 0.5, "the stream has no held-out set", transform=axes.transAxes, ha="center", color="#555555")
        return
    ends = [group.held_out()[-1] for group, _ in shown]
    inches = axes.get_position().height * axes.figure.bbox.height / axes.figure.dpi
    low, high = axes.get_ylim()
    gap = (high - low) * 0.155 / max(inches, 1.0)  # a line of letters, in percent
    for (group, (colour, _)), end, y in zip(shown, ends, spread(ends, gap, low, high)):
        axes.annotate(
            group.label,
            (len(tasks), end),
            (len(tasks) * 1.06, y),
            color=colour,
            fontsize=8,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": "#bbbbbb",
                "lw": 0.6,
                "shrinkA": 1,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
        )


def _bars_of(axes: Any, group: Group, i: int, groups: int, space: str) -> None:
    width = 0.8 / groups
    for x, (key, _) in enumerate(_BARS):
        value, deviation = group.mean(space, key), group.deviation(space, key)
        if value is None:
            continue
        at = x + (i - (groups - 1) / 2) * width
        style = {"color": COLOURS[i], "hatch": _HATCHES[i], "edgecolor": "white", "lw": 0}
        axes.bar(at, value, 0.92 * width, yerr=deviation, capsize=3, label=group.label if x == 0 else "", **style)
        top = (at, max(value, 0) + (deviation or 0))
        size = 8 if groups <= 4 else 6.5
        axes.annotate(f"{value:.1f}", top, (0, 2), textcoords="offset points", ha="center", fontsize=size)
