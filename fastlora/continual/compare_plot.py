"""The plot of a comparison: what was learned, kept and forgotten, and what pretraining knew, per method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from fastlora.continual.compare import Group
from fastlora.continual.plots import OKABE_ITO, STYLE, save

_BARS = (
    ("learning", "Learning\n(higher is better)"),
    ("forgetting", "Forgetting\n(lower is better)"),
    ("last", "Last\n(higher)"),
    ("transfer", "Transfer\n(higher)"),
)
_HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")


def draw_comparison(groups: Sequence[Group], path: Path) -> Path:
    """Bars of the figures in the own label space, and held-out accuracy over the stream, as a PNG at `path`."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        bars, curves = figure.subplots(1, 2, width_ratios=(3, 2))
        for i, group in enumerate(groups):
            _draw_bars(bars, group, i, len(groups))
            if group.held_out():
                curves.plot(group.held_out(), _marker(i), color=OKABE_ITO[i % 8], ms=5, label=group.label)
        bars.set_xticks(range(len(_BARS)), [title for _, title in _BARS])
        bars.set(ylabel="percent; forgetting in points", title="Tasks (own label space)")
        bars.axhline(0, color="black", lw=0.8)
        tasks = groups[0].runs[0].record.tasks
        curves.set(
            xlabel="tasks trained", ylabel="accuracy (%)", title="Held-out set: what pretraining knew", ylim=(0, None)
        )
        curves.set_xticks(range(len(tasks) + 1))
        for axes in (bars, curves):
            axes.grid(True, axis="y")
            axes.set_axisbelow(True)
        figure.legend(*bars.get_legend_handles_labels(), loc="outside upper center", ncols=min(len(groups), 5))
        return save(figure, path)


def _draw_bars(axes: Any, group: Group, i: int, groups: int) -> None:
    width = 0.8 / groups
    for x, (key, _) in enumerate(_BARS):
        value = group.mean("own", key)
        if value is None:
            continue
        at = x + (i - (groups - 1) / 2) * width
        label = group.label if x == 0 else None
        style = {"color": OKABE_ITO[i % 8], "hatch": _HATCHES[i % 8], "edgecolor": "white", "lw": 0}
        axes.bar(at, value, 0.92 * width, yerr=group.deviation("own", key), capsize=3, label=label, **style)
        text = (at, max(value, 0) + (group.deviation("own", key) or 0))
        axes.annotate(f"{value:.1f}", text, (0, 2), textcoords="offset points", ha="center", fontsize=8)


def _marker(i: int) -> str:
    return "osD^v<>P"[i % 8] + ("-", "--", "-.", ":")[i % 4]
