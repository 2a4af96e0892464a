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
DEFINITIONS = (
    "Learning: accuracy on each data set right after its training, mean over the data sets.",
    "Forgetting: how far each data set ends below its best since its training, mean over all but the last.",
    "Last: accuracy at the end, mean over the data sets.",
    "Average: accuracy over the whole stream, mean over tasks and data sets.",
    "Transfer: accuracy on data sets that are still to come, mean over the earlier tasks.",
    "Held-out: accuracy on data that no task trains, before the first task and after the last.",
    "Mean rank: components that an adapter keeps, mean over modules and tasks.",
    "Own label space: among the tested data set's classes. Union: among the classes of all tasks, task unknown.",
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


def number(value: float | None, deviation: float | None = None, digits: int = 1) -> str:
    """`digits` decimals; a dash for what is undefined."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation is not None else "")


def duration(seconds: float) -> str:
    """'2 h 5 min', '3 min 12 s', '4.2 s'."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
