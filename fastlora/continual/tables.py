"""Plain-text tables of runs, and the figures they share with the page and the plots."""

from __future__ import annotations

from collections.abc import Sequence

# key in metrics.json, heading, unit; learning and forgetting stand side by side everywhere
FIGURES = (
    ("learning", "Learning", "%"),
    ("forgetting", "Forgetting", "points"),
    ("last", "Last", "%"),
    ("average", "Average", "%"),
    ("transfer", "Transfer", "%"),
    ("held_out_before", "Held-out before", "%"),
    ("held_out", "Held-out after", "%"),
    ("mean_rank", "Mean rank", ""),
)
READ_TOGETHER = "Read Learning beside Forgetting: a method that learns nothing forgets nothing."
SPACE_TITLES = {
    "own": "own label space (the tested data set's classes)",
    "union": "union label space (the classes of all tasks, task unknown)",
}


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "  ") -> str:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        lines.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def row_names(tasks: Sequence[str], rows: int) -> list[str]:
    """'before', 'after 1 outlines', ... for the rows of an accuracy table."""
    return ["before", *(f"after {i} {name}" for i, name in enumerate(tasks, start=1))][:rows]


def accuracy_table(tasks: Sequence[str], rows: Sequence[Sequence[float]]) -> str:
    """Accuracy in percent, one row before training and one after each task; the newest task's data set in brackets."""
    cells = [
        [name, *(f"[{value:.1f}]" if j == i - 1 else f"{value:.1f} " for j, value in enumerate(row))]
        for i, (name, row) in enumerate(zip(row_names(tasks, len(rows)), rows))
    ]
    return text_table(["accuracy %", *(f"{name} " for name in tasks)], cells)


def number(value: float | None, deviation: float | None = None) -> str:
    """One decimal; a dash for what is undefined."""
    if value is None:
        return "-"
    return f"{value:.1f}" if deviation is None else f"{value:.1f} ± {deviation:.1f}"
