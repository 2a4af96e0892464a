"""The frontier: what is learned against what is forgotten, and against what is left of what pretraining knew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from fastlora.continual.compare import Group
from fastlora.continual.drawing import COLOURS, WIDTH, place_labels

# figure on the x axis, label, whether more of it is better
AXES = (
    ("forgetting", "Forgetting (points, less is better)", False),
    ("held_out", "Held-out after the last task (%, more is better)", True),
)


def efficient(points: Sequence[tuple[float, float]], more_is_better: bool) -> list[int]:
    """Indices of the points that no other one beats, in the order of x.

    Args:
        points: (x, y); more y is better, and more x too where `more_is_better`, else less.
    Returns:
        The points to which no other is at least as good in both and better in one; of equal points all.
    """
    sign = 1.0 if more_is_better else -1.0
    better = [(sign * x, y) for x, y in points]
    kept = [i for i, (x, y) in enumerate(better) if not any(a >= x and b >= y and (a > x or b > y) for a, b in better)]
    return sorted(kept, key=lambda i: points[i])


def frontier_groups(groups: Sequence[Group], space: str, figure: str) -> list[Group]:
    """The groups that no other one beats in learning and `figure` together; those without a value take no part."""
    known = [group for group in groups if None not in (group.mean(space, "learning"), group.mean(space, figure))]
    more_is_better = {key: more for key, _, more in AXES}[figure]
    return [known[i] for i in efficient([_point(group, space, figure) for group in known], more_is_better)]


def styles(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """(colour, marker) per group: a colour each up to eight groups, else a colour per method; no pair twice up to 64."""
    if len(groups) <= len(COLOURS):
        return [(COLOURS[i], "osD^v<>P"[i]) for i in range(len(groups))]
    methods = list(dict.fromkeys(group.method for group in groups))
    used: dict[int, int] = {}
    result = []
    for group in groups:
        colour = methods.index(group.method) % len(COLOURS)
        used[colour] = used.get(colour, -1) + 1
        result.append((COLOURS[colour], "osD^v<>P"[used[colour] % 8]))
    return result


def frontier_plot(groups: Sequence[Group], space: str) -> Figure:
    """Learning against forgetting and against the held-out set; the efficient groups are joined by a line."""
    figure = Figure(figsize=(WIDTH, 4.6 if len(groups) <= 8 else 6.2), layout="constrained")
    place = [draw_frontier(axes, groups, space, key) for axes, (key, _, _) in zip(figure.subplots(1, 2), AXES)]
    for labels in place:
        place_labels(*labels)
    return figure


def draw_frontier(axes: Any, groups: Sequence[Group], space: str, key: str) -> tuple[Any, ...]:
    """Learning against figure `key` on these axes. Returns the arguments of `place_labels`, which is to come last."""
    points, texts, colours, lines = [], [], [], []
    for group, (colour, marker) in zip(groups, styles(groups)):
        if None in (group.mean(space, "learning"), group.mean(space, key)):
            continue
        x, y = _point(group, space, key)
        spread = {"xerr": group.deviation(space, key), "yerr": group.deviation(space, "learning")}
        axes.errorbar(x, y, **spread, fmt=marker, color=colour, ms=6, elinewidth=0.8, capsize=2, zorder=3)
        points.append((x, y))
        lines += _between((x - (spread["xerr"] or 0), y), (x + (spread["xerr"] or 0), y))
        lines += _between((x, y - (spread["yerr"] or 0)), (x, y + (spread["yerr"] or 0)))
        texts.append(group.label)
        colours.append(colour)
    label, more_is_better = next((label, more) for name, label, more in AXES if name == key)
    line = [points[i] for i in efficient(points, more_is_better)]
    axes.plot([x for x, _ in line], [y for _, y in line], color="#888888", lw=1, zorder=1)
    before = [
        sum(run.record.own[0] if space == "own" else run.record.union[0]) / len(run.record.tasks)
        for run in groups[0].runs
    ]
    axes.axhline(sum(before) / len(before), color="#aaaaaa", lw=0.8, ls=":", zorder=0)
    axes.set(xlabel=label, ylabel=f"Learning (%, {space} label space)")
    axes.set_title("top right is best" if more_is_better else "top left is best", fontsize=9, color="#555555")
    axes.margins(0.14)
    axes.grid(True)
    axes.set_axisbelow(True)
    for start, end in zip(line, line[1:]):
        lines += _between(start, end)
    return axes, points, texts, colours, lines


def _between(start: tuple[float, float], end: tuple[float, float]) -> list[tuple[float, float]]:
    """Points on a straight line, dense enough that no text fits between two."""
    shares = [k / 24 for k in range(25)]
    return [(start[0] + t * (end[0] - start[0]), start[1] + t * (end[1] - start[1])) for t in shares]


def _point(group: Group, space: str, figure: str) -> tuple[float, float]:
    x, y = group.mean(space, figure), group.mean(space, "learning")
    assert x is not None and y is not None
    return x, y
