"""Runs of methods on the embedded benchmark, several processes at a time, and their figures."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from method_grid import Entry

COLUMNS = (
    ("learning", "Learning"),
    ("forgetting", "Forgetting"),
    ("last", "Last"),
    ("average", "Average"),
    ("transfer", "Transfer"),
    ("held_out", "Held-out"),
    ("mean_rank", "Kept rank"),
)


@dataclass(frozen=True)
class Job:
    """One run: an entry with one of its values (None where it has none) and a seed."""

    entry: Entry
    benchmark: str
    value: float | None
    seed: int

    def path(self, runs: Path) -> Path:
        value = "" if self.value is None else f"-{self.entry.vary}{self.value:g}"
        label = self.entry.label.replace(" ", "_").replace("/", "_")
        return runs / f"{self.benchmark}-{label}{value}-seed{self.seed}"

    def config(self) -> Any:
        """The method's options: its defaults, the benchmark's, the entry's, the value."""
        from fastlora.continual.benchmarks import benchmark
        from fastlora.continual.config import CONFIGS

        config = CONFIGS[self.entry.method]
        value = {} if self.value is None else {self.entry.vary: self.value}
        return config(**(benchmark(self.benchmark).preset(config) | self.entry.options | value))

    def figures(self, runs: Path) -> dict[str, Any] | None:
        """Both label spaces' figures, the held-out curve and the seconds; None unless a run of these options is finished."""
        path = self.path(runs)
        if not finished(path, self.config()):
            return None
        metrics = json.loads((path / "metrics.json").read_text())
        keys = [key for key, _ in COLUMNS]
        return {
            "own": {key: metrics[key] for key in keys},
            "union": {key: metrics["union"][key] for key in keys},
            "held_out_curve": metrics["held_out_curve"],
            "seconds": json.loads((path / "manifest.json").read_text())["seconds"],
        }


def train(job: Job, runs: Path) -> str:
    """Train, unless a finished run of the same settings is there."""
    import torch

    from fastlora.continual import Trainer
    from fastlora.continual.benchmarks import benchmark
    from fastlora.continual.config import RunConfig

    torch.set_num_threads(1)
    path, config = job.path(runs), job.config()
    if finished(path, config):
        return f"{path.name} is there"
    shutil.rmtree(path, ignore_errors=True)
    run = RunConfig(benchmark=job.benchmark, method=config, seed=job.seed)
    loaded = benchmark(job.benchmark).load(run)
    Trainer(*loaded, config, seed=job.seed, out=path, checkpoints="none", progress=False).fit()
    return f"{path.name}: {line(job.figures(runs))}"


def finished(path: Path, config: Any) -> bool:
    """Whether `path` holds a finished run with this method's options."""
    import yaml

    from fastlora.continual.config import method_config

    try:
        manifest = json.loads((path / "manifest.json").read_text())
        # read as a config: an option that is newer than the run has its default
        trained = method_config(**yaml.safe_load((path / "config.yaml").read_text())["method"])
    except (OSError, ValueError, KeyError):
        return False
    return manifest["status"] == "finished" and trained == config


def arguments(doc: str | None, what: tuple[str, ...], seeds: list[int]) -> argparse.ArgumentParser:
    """What the scripts of these runs have in common. From here on processes that start are single-threaded."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # before the workers import torch
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=what)
    parser.add_argument("--runs", type=Path, required=True, help="where the runs are")
    parser.add_argument("--only", nargs="+", help="labels of the rows; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="JSON to write (show)")
    parser.add_argument("--docs", type=Path, help="page whose tables are replaced (show)")
    return parser


def chosen(entries: Iterable[Entry], only: list[str] | None) -> list[Entry]:
    """The entries of --only; all of them without it."""
    entries = list(entries)
    unknown = sorted(set(only or ()) - {entry.label for entry in entries})
    if unknown:
        sys.exit(f"--only names {', '.join(unknown)}; accepted: {', '.join(entry.label for entry in entries)}")
    return [entry for entry in entries if not only or entry.label in only]


def write_json(result: dict[str, Any], path: Path | None) -> None:
    if path:
        path.write_text(json.dumps(result, indent=1) + "\n")


def run_all(jobs: list[Job], runs: Path, processes: int) -> None:
    """Each job in one of `processes` single-threaded processes; a failure is told at the end and loses nothing else."""
    runs.mkdir(parents=True, exist_ok=True)
    failed = []
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(train, job, runs): job for job in jobs}
        for count, future in enumerate(as_completed(futures), start=1):
            try:
                said = future.result()
            except Exception as error:
                failed.append(futures[future])
                said = f"{futures[future].path(runs).name} FAILED: {error}"
            print(f"[{count}/{len(jobs)}] {said}", flush=True)
    if failed:
        sys.exit(f"{len(failed)} of {len(jobs)} runs failed")


def spread(figures: list[dict[str, Any]]) -> dict[str, Any]:
    """Figure -> mean and sample standard deviation over the seeds, None where it is undefined."""
    found = {}
    for key, _ in COLUMNS:
        values = [figure[key] for figure in figures if figure[key] is not None]
        mean = statistics.fmean(values) if values else None
        found[key] = {"mean": mean, "sd": statistics.stdev(values) if len(values) > 1 else None}
    return found


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def cell(figure: dict[str, Any]) -> str:
    """A figure of `spread`: mean ± s.d."""
    return number(figure["mean"]) + (f" ± {figure['sd']:.1f}" if figure["sd"] is not None else "")


def markdown(lines: list[list[str]], texts: int = 1) -> str:
    """A table whose first line is the head; the first `texts` columns are words, the others figures."""
    head, *rows = lines
    rule = ["---"] * texts + ["---:"] * (len(head) - texts)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def replace_between(page: Path, mark: str, end: str, text: str) -> None:
    """Put `text` between two marks of a page; behind it all, with the marks, where there are none."""
    before, _, rest = page.read_text().partition(mark)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{mark}\n\n{text}\n\n{end}{after}")


def line(figures: dict[str, Any]) -> str:
    return ", ".join(f"{title} {number(figures['own'][key])}" for key, title in COLUMNS)
