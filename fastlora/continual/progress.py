"""What a run prints: a live bar in a terminal and in a notebook, lines anywhere else."""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any


class Progress:
    """Context manager. With `enabled=False` it prints nothing.

    In a terminal, and in a notebook that has ipywidgets, a bar shows figures, images per second and the time left.
    Elsewhere (a pipe, a file) the same is a line, when the last one was printed long enough ago.

    Args:
        label: starts every line, so that runs that share an output can be told apart.
        every: seconds without a line after which `step` prints one where there is no bar.
    """

    def __init__(self, label: str, enabled: bool = True, every: float = 60.0) -> None:
        self._label, self._enabled, self._every = label, enabled, every
        self._bar: Any = None
        self._bar_task: Any = None
        self._print: Any = print
        self._last_line = time.monotonic()

    def __enter__(self) -> Progress:
        if self._enabled:
            from rich.console import Console

            console = Console(highlight=False, soft_wrap=True)
            # without ipywidgets rich draws nothing in a notebook, and warns at every refresh
            notebook = console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
            if notebook or not console.is_jupyter:
                self._print = functools.partial(console.print, markup=False)
            if notebook or console.is_terminal:
                self._bar = _bar(console)
                self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, description: str, total: int) -> None:
        """A new bar of `total` steps in place of the last one."""
        self._description, self._total, self._images = description, total, 0
        self._done, self._start = 0, time.monotonic()
        if self._bar is not None:
            if self._bar_task is not None:
                self._bar.remove_task(self._bar_task)
            self._bar_task = self._bar.add_task(f"{self._label}  {description}", total=total, figures="")

    def step(self, done: int, images: int = 0, **figures: float | None) -> None:
        """Move the bar to `done` steps and show the figures that are not None.

        Args:
            images: seen in each step since the last call.
        """
        self._images += images * (done - self._done)
        self._done = done
        seconds = max(time.monotonic() - self._start, 1e-9)
        parts = [f"{name} {value:.4g}" for name, value in figures.items() if value is not None]
        if self._images:
            parts.append(f"{self._images / seconds:.0f} images/s")
        if self._bar is not None:
            self._bar.update(self._bar_task, completed=done, figures="  ".join(parts))
        elif self._enabled and time.monotonic() - self._last_line >= self._every:
            parts.append(f"{_clock(seconds / done * (self._total - done))} left")
            self.line(f"{self._description}: {done}/{self._total}, {', '.join(parts)}")

    def line(self, text: str) -> None:
        if self._enabled:
            self._last_line = time.monotonic()
            self._print(f"{self._label}  {text}")


def _bar(console: Any) -> Any:
    """Bar, steps and time left; the figures on a line of their own, since 80 columns hold no more."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class TwoLines(Progress):
        def get_renderables(self) -> Iterator[Any]:
            yield self.make_tasks_table(self.tasks)
            yield from (Text(f"  {task.fields['figures']}", style="dim") for task in self.tasks)

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
    return TwoLines(*columns, console=console, transient=True)


def _clock(seconds: float) -> str:
    """'1:05:09' or '0:07'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
