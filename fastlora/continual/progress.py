"""What a run prints: a live bar in a terminal, one line per task anywhere else."""

from __future__ import annotations

from types import TracebackType
from typing import Any


class Progress:
    """Context manager. With `enabled=False` it prints nothing.

    Args:
        label: starts every line, so that runs that share an output can be told apart.
    """

    def __init__(self, label: str, enabled: bool = True) -> None:
        self._label, self._enabled = label, enabled
        self._bar: Any = None
        self._bar_task: Any = None

    def __enter__(self) -> Progress:
        if self._enabled:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._console = Console(highlight=False, soft_wrap=True)
            if self._console.is_terminal:
                columns = (
                    TextColumn("{task.description}"),
                    BarColumn(bar_width=20),
                    MofNCompleteColumn(),
                    TimeRemainingColumn(),
                )
                self._bar = Bar(*columns, TextColumn("{task.fields[figures]}"), console=self._console, transient=True)
                self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, description: str, total: int) -> None:
        """A new bar of `total` steps in place of the last one."""
        if self._bar is not None:
            if self._bar_task is not None:
                self._bar.remove_task(self._bar_task)
            self._bar_task = self._bar.add_task(f"{self._label}  {description}", total=total, figures="")

    def step(self, done: int, **figures: Any) -> None:
        """Move the bar to `done` steps and show the figures that are not None."""
        if self._bar is not None:
            text = "  ".join(f"{name} {value:.4g}" for name, value in figures.items() if value is not None)
            self._bar.update(self._bar_task, completed=done, figures=text)

    def line(self, text: str) -> None:
        if self._enabled:
            self._console.print(f"{self._label}  {text}", markup=False)
