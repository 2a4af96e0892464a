"""What a run measures: accuracies in both label spaces, held-out accuracy, ranks, and the figures made of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastlora.continual.metrics import FIGURES, summarize

LABEL_SPACES = ("own", "union")


@dataclass(frozen=True)
class RankEntry:
    """One adapted module of one task (counted from 1): rank before pruning, components kept, ||delta W||_F merged."""

    task: int
    module: str
    rank: int
    active_rank: int
    delta_norm: float


@dataclass
class Record:
    """Measurements of a run so far.

    Args:
        tasks: names in stream order.
        own, union: row 0 before training, row i after task i; percent, one value per task.
        held_out: percent, one per row; empty where the stream has no held-out set.
        ranks: one entry per finished task and adapted module.
        drift: ||theta - theta_0||_F, one per row; empty in runs that did not measure it.
    """

    tasks: list[str]
    own: list[list[float]] = field(default_factory=list)
    union: list[list[float]] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    ranks: list[RankEntry] = field(default_factory=list)
    drift: list[float] = field(default_factory=list)

    @property
    def finished_tasks(self) -> int:
        return max(0, len(self.own) - 1)

    def add(self, own: Any, union: Any, held_out: float | None, drift: float | None = None) -> None:
        """Append the row of one evaluation."""
        self.own.append(list(own))
        self.union.append(list(union))
        if held_out is not None:
            self.held_out.append(held_out)
        if drift is not None:
            self.drift.append(drift)

    def mean_rank(self) -> float | None:
        """Mean kept rank over the modules of all finished tasks."""
        return sum(entry.active_rank for entry in self.ranks) / len(self.ranks) if self.ranks else None

    def metrics(self) -> dict[str, Any]:
        """The figures of the own label space, the same of the union under 'union'.

        Of an unfinished stream: those of the stream that ends after the last finished task. The held-out set has its
        own classes, which are no part of the union: both label spaces show the same held-out accuracy.
        """
        shared, reasons = self._shared()
        figures = {space: self._figures(getattr(self, space)) for space in LABEL_SPACES}
        for values in figures.values():
            values.update(shared)
            values["reasons"] = values["reasons"] | reasons
        progress = {"tasks": self.tasks, "finished_tasks": self.finished_tasks, "held_out_curve": self.held_out}
        progress["drift_curve"] = self.drift
        return figures["own"] | progress | {"union": figures["union"]}

    def summary(self) -> str:
        """One line on the newest row."""
        row, done = self.own[-1], self.finished_tasks
        parts = [f"{row[done - 1]:.1f} % on it", f"{sum(row[:done]) / done:.1f} % on tasks so far"] if done else []
        parts.append(f"{sum(row) / len(row):.1f} % on all tasks")
        if self.held_out:
            parts.append(f"{self.held_out[-1]:.1f} % held-out")
        ranks = [entry.active_rank for entry in self.ranks if entry.task == done]
        if ranks:
            parts.append(f"mean rank {sum(ranks) / len(ranks):.2f}")
        return ", ".join(parts)

    def newest(self) -> dict[str, float]:
        """The newest row by name: 'accuracy_own/NAME' and 'accuracy_union/NAME' in percent, held-out, drift."""
        values = {
            f"accuracy_{space}/{name}": value
            for space in LABEL_SPACES
            for name, value in zip(self.tasks, getattr(self, space)[-1])
        }
        if self.held_out:
            values["accuracy_held_out"] = self.held_out[-1]
        return values | ({"drift": self.drift[-1]} if self.drift else {})

    def _shared(self) -> tuple[dict[str, float | None], dict[str, str]]:
        shared = {
            "held_out_before": self.held_out[0] if self.held_out else None,
            "held_out": self.held_out[-1] if self.held_out else None,
            "mean_rank": self.mean_rank(),
        }
        reasons = {}
        if not self.held_out:
            text = "the stream has no held-out set" if self.own else "nothing has been evaluated yet"
            reasons = {"held_out_before": text, "held_out": text}
        if not self.ranks:
            reasons["mean_rank"] = "no task was trained with adapters"
        return shared, reasons

    def _figures(self, rows: list[list[float]]) -> dict[str, Any]:
        done = self.finished_tasks
        if done == 0:
            reason = "no task is finished"
            return {name: None for name in FIGURES} | {"per_dataset": {}, "reasons": {name: reason for name in FIGURES}}
        return summarize([row[:done] for row in rows[1:]], rows[0][:done])
