"""Does data choose the components that a method keeps? One task, trained again with one thing changed at a time.

What survives is compared with what survived the first time. A method that lets its data choose keeps other components
on other data; one whose random start has chosen already keeps the same ones, and others with other gates.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch.utils.data import Dataset, Subset

import fastlora
from fastlora.adapt import RankReport
from fastlora.continual.benchmarks import benchmark
from fastlora.continual.config import RunConfig
from fastlora.continual.methods import METHODS, TaskContext
from fastlora.continual.methods.base import AdapterMethod
from fastlora.continual.stream import TaskStream
from fastlora.continual.tables import text_table
from fastlora.continual.trainer import Trainer
from fastlora.files import write_atomically

Kept = dict[str, frozenset[int]]
"""Module -> which of its components survived, counted as they were drawn."""


@dataclass(frozen=True)
class Start:
    """Where a training starts from: seeds of the training images and their order, of the gates (and of whatever else the
    method draws), and of lora_a; and the task, from 0."""

    data: int
    gates: int
    lora_a: int
    task: int = 0


@dataclass(frozen=True)
class Comparison:
    """Survivors of two trainings.

    Args:
        name: what was the same and what was not.
        per_module: module -> (Jaccard overlap, its expectation for random subsets of the same sizes); without the
            modules where nothing survived either time.
        rank_correlation: Pearson's, over the modules, of how many survived; None where one of the two is constant.
    """

    name: str
    per_module: dict[str, tuple[float, float]]
    rank_correlation: float | None

    def means(self, tower: str | None = None) -> tuple[float, float] | None:
        """(overlap, chance), means over the modules of a tower, or of all; None without any."""
        pairs = [pair for name, pair in self.per_module.items() if tower in (None, _tower(name))]
        return (statistics.fmean(p[0] for p in pairs), statistics.fmean(p[1] for p in pairs)) if pairs else None


@dataclass(frozen=True)
class Selection:
    """The comparisons of one method's run."""

    run: RunConfig
    tasks: tuple[str, ...]
    comparisons: tuple[Comparison, ...]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        head = {"method": self.run.method.name, "config": self.run.as_dict(), "tasks": list(self.tasks)}
        return head | {"comparisons": [_as_dict(comparison) for comparison in self.comparisons]}

    def write(self, directory: Path) -> Path:
        """selection.json in `directory`."""
        path = directory / "selection.json"
        write_atomically(path, (json.dumps(self.as_dict(), indent=2) + "\n").encode())
        return path

    def __str__(self) -> str:
        header = ["survivors of", "Jaccard", "chance", "vision", "chance", "text", "chance", "ranks' correlation"]
        rows = [
            [each.name, *(cell for tower in (None, "vision", "text") for cell in _cells(each.means(tower), 2)),
             *_cells((each.rank_correlation,) if each.rank_correlation is not None else None, 1)]
            for each in self.comparisons
        ]  # fmt: skip
        task = f"task {self.tasks[0]}" + (f", other task {self.tasks[1]}" if len(self.tasks) > 1 else "")
        return f"{self.run.method.name} on {self.run.benchmark}, seed {self.run.seed}, {task}:\n" + text_table(
            header, rows
        )


def measure(run: RunConfig, say: Callable[[str], None] = lambda line: None) -> Selection:
    """Train the first task of a run's benchmark with the run's method, and again with one thing changed at a time.

    Args:
        run: its benchmark, data, method, seed, device and backend count.
        say: gets a line for each training.
    Raises:
        ValueError: the method selects no components, or none of them survives.
    """
    method = METHODS[run.method.name]
    if not method.selects:
        selecting = [name for name, each in METHODS.items() if each.selects]
        raise ValueError(
            f"method {run.method.name} selects no components; those that do: {', '.join(selecting)}. Compare a run of one."
        )
    tasks = tuple(task.name for task in benchmark(run.benchmark).load(run).stream.tasks[:2])
    first, *others = starts(run.seed, len(tasks), draws=method(run.method).draws)
    kept = []
    for number, (name, start) in enumerate([first, *others], start=1):
        say(f"{run.method.name}, training {number} of {len(others) + 1}: {name}")
        kept.append(kept_components(run, start))
    rank = run.method.as_dict()["rank"]
    comparisons = [compare(name, kept[0], other, rank) for (name, _), other in zip(others, kept[1:])]
    return Selection(run, tasks, tuple(comparisons))


def starts(seed: int, tasks: int, draws: str) -> list[tuple[str, Start]]:
    """The first start and those that differ from it in one thing, by name; what a benchmark or a method lacks is left out."""
    first = Start(seed, seed, seed)
    found = [("the first", first), ("same gates, other data", dataclasses.replace(first, data=seed + 1))]
    if tasks > 1:
        found.append(("same gates, other task", dataclasses.replace(first, task=1)))
    if draws:
        found.append((f"other {draws}, same data", dataclasses.replace(first, gates=seed + 1)))
    return [*found, ("same gates, other lora_a", dataclasses.replace(first, lora_a=seed + 1))]


def kept_components(run: RunConfig, start: Start) -> Kept:
    """Train one task from `start` on the plain model; what survives."""
    config = dataclasses.replace(run, seed=start.data, log_to=(), parallel="ddp")
    loaded = benchmark(run.benchmark).load(config)
    given = loaded.stream.tasks[start.task]
    # nobody looks at the accuracies here: one test image is enough
    images = cast("Dataset[Any]", given.test)  # Subset asks no more of it
    task = dataclasses.replace(given, train=loaded.stream.open_task(start.task), test=Subset(images, [0]))
    stream = TaskStream(run.benchmark, [task])
    trainer = Trainer(loaded.model, loaded.tokenizer, stream, config=config, progress=False)
    observed = type("Observed", (_Observed, METHODS[run.method.name]), {})
    own: _Observed = observed(run.method, backend=run.backend)
    own.start = start
    trainer.method = own
    trainer.fit()
    return own.kept


class _Observed(AdapterMethod):
    """Goes before a method: draws by the seeds of `start`, lets dead components stay to the end, and notes the others."""

    start: Start
    kept: Kept

    def begin_task(self, ctx: TaskContext) -> None:
        ctx.seed = self.start.gates
        super().begin_task(ctx)

    def draw(self, ctx: TaskContext) -> None:
        super().draw(dataclasses.replace(ctx, seed=self.start.lora_a))
        lora_as = [adapter.lora_a.detach().clone() for _, adapter in fastlora.adapters(ctx.model)]
        super().draw(ctx)
        for (_, adapter), lora_a in zip(fastlora.adapters(ctx.model), lora_as):
            adapter.lora_a.data.copy_(lora_a)

    def drop_dead(self, ctx: TaskContext) -> None:
        """Components keep their numbers; a dead one changes nothing by its presence."""

    def end_task(self, ctx: TaskContext) -> RankReport:
        self.kept = {
            name: frozenset(adapter.gate.detach().nonzero().flatten().tolist())
            for name, adapter in fastlora.adapters(ctx.model)
        }
        return super().end_task(ctx)


def compare(name: str, first: Kept, second: Kept, rank: int) -> Comparison:
    """Overlap of what survived, module by module, of `rank` components each."""
    per_module = {
        module: (len(kept & second[module]) / len(kept | second[module]), chance)
        for module, kept in first.items()
        if (chance := chance_jaccard(rank, len(kept), len(second[module]))) is not None
    }
    if not per_module:
        raise ValueError(f"{name}: no component survived in any module. Lower the threshold (kappa, or shrink).")
    counts = [[len(kept[module]) for module in first] for kept in (first, second)]
    varied = all(len(set(each)) > 1 for each in counts)
    return Comparison(name, per_module, statistics.correlation(*counts) if varied else None)


def chance_jaccard(total: int, first: int, second: int) -> float | None:
    """E |S & T| / |S | T| of two independent random subsets of these sizes out of `total`, exact: |S & T| is hypergeometric.

    Returns:
        None where both are empty: their overlap is not defined.
    """
    if first == second == 0:
        return None
    shared = range(min(first, second) + 1)
    ways = [math.comb(first, both) * math.comb(total - first, second - both) for both in shared]
    overlaps = [both / (first + second - both) for both in shared]
    return sum(way * overlap for way, overlap in zip(ways, overlaps)) / math.comb(total, second)


def _tower(module: str) -> str:
    return "vision" if module.startswith("visual.") else "text"


def _as_dict(comparison: Comparison) -> dict[str, Any]:
    overlap, chance = comparison.means() or (None, None)
    return {
        "name": comparison.name,
        "jaccard": overlap,
        "chance": chance,
        "rank_correlation": comparison.rank_correlation,
        "towers": {tower: comparison.means(tower) for tower in ("vision", "text")},
        "per_module": comparison.per_module,
    }


def _cells(values: Sequence[float] | None, columns: int) -> Iterable[str]:
    return ["-"] * columns if values is None else [f"{value:.3f}" for value in values]
