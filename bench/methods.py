"""Every method on the embedded benchmark: learning rates chosen on validation sets, figures on test sets.

python bench/methods.py sweep --runs DIR            one seed of each method and learning rate, on the validation sets
python bench/methods.py test --runs DIR             three seeds of each method at its best rate, on the test sets
python bench/methods.py show --runs DIR --out bench/results/methods.json --docs docs/methods.md

The best rate is that of the highest Average in the own label space: the mean over all data sets and all tasks, which
counts what is learned, what is kept, and what is still to come. Runs that are finished are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from method_grid import GRID, Entry

SWEEP_SEED = 100  # no seed of the table
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
    return f"{path.name}: {_line(figures_of(path))}"


def finished(path: Path, config: Any) -> bool:
    """Whether `path` holds a finished run with this method's options."""
    import yaml

    try:
        manifest = json.loads((path / "manifest.json").read_text())
        method = yaml.safe_load((path / "config.yaml").read_text())["method"]
    except (OSError, ValueError, KeyError):
        return False
    return manifest["status"] == "finished" and method == config.as_dict()


def figures_of(path: Path) -> dict[str, Any]:
    """Both label spaces' figures, the held-out curve, the tables and the seconds of a run."""
    metrics = json.loads((path / "metrics.json").read_text())
    manifest = json.loads((path / "manifest.json").read_text())
    keys = [key for key, _ in COLUMNS]
    return {
        "own": {key: metrics[key] for key in keys},
        "union": {key: metrics["union"][key] for key in keys},
        "held_out_curve": metrics["held_out_curve"],
        "learned": metrics["per_dataset"].get("learning"),
        "seconds": manifest["seconds"],
    }


def run_all(jobs: list[Job], runs: Path, processes: int) -> None:
    """Each job in one of `processes` single-threaded processes; a failure is told at the end and loses nothing else."""
    runs.mkdir(parents=True, exist_ok=True)
    failed = []
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(train, job, runs): job for job in jobs}
        for number, future in enumerate(as_completed(futures), start=1):
            try:
                print(f"[{number}/{len(jobs)}] {future.result()}", flush=True)
            except Exception as error:
                failed.append(futures[future])
                print(f"[{number}/{len(jobs)}] {futures[future].path(runs).name} FAILED: {error}", flush=True)
    if failed:
        sys.exit(f"{len(failed)} of {len(jobs)} runs failed")


def sweep_jobs(entries: list[Entry]) -> list[Job]:
    return [Job(entry, "demo_validation", value, SWEEP_SEED) for entry in entries for value in entry.values or (None,)]


def test_jobs(entries: list[Entry], runs: Path, seeds: list[int]) -> list[Job]:
    return [Job(entry, "demo", best_value(entry, runs), seed) for seed in seeds for entry in entries]


def best_value(entry: Entry, runs: Path) -> float | None:
    """The value with the highest Average on the validation sets."""
    if not entry.values:
        return None
    found = {value: figures_of(Job(entry, "demo_validation", value, SWEEP_SEED).path(runs)) for value in entry.values}
    return max(found, key=lambda value: found[value]["own"]["average"])


def gather(entries: list[Entry], runs: Path, seeds: list[int]) -> dict[str, Any]:
    """Everything that is finished, with the conditions it was measured under."""
    rows = []
    for entry in entries:
        sweep = {job.value: job.path(runs) for job in sweep_jobs([entry])}
        if not all((path / "metrics.json").exists() for path in sweep.values()):
            continue
        value = best_value(entry, runs)
        tests = [Job(entry, "demo", value, seed).path(runs) for seed in seeds]
        done = [figures_of(path) for path in tests if (path / "metrics.json").exists()]
        if len(done) < len(seeds):
            continue
        row = {
            "label": entry.label,
            "method": entry.method,
            "options": entry.options,
            "vary": entry.vary,
            "value": value,
        }
        row["sweep"] = {f"{tried}": figures_of(path)["own"] for tried, path in sweep.items()}
        row |= {space: _spread([figures[space] for figures in done]) for space in ("own", "union")}
        row["seconds"] = statistics.fmean(sum(figures["seconds"].values()) for figures in done)
        row["evaluation_share"] = statistics.fmean(
            figures["seconds"]["evaluate"] / sum(figures["seconds"].values()) for figures in done
        )
        row["held_out_curve"] = [statistics.fmean(values) for values in zip(*(f["held_out_curve"] for f in done))]
        rows.append(row)
    from fastlora.continual.manifest import versions

    return {"command": "python bench/methods.py", "seeds": seeds, "versions": versions(), "rows": rows}


def _spread(figures: list[dict[str, Any]]) -> dict[str, Any]:
    """Figure -> mean and sample standard deviation over the seeds, None where it is undefined."""
    spread = {}
    for key, _ in COLUMNS:
        values = [figure[key] for figure in figures if figure[key] is not None]
        mean = statistics.fmean(values) if values else None
        spread[key] = {"mean": mean, "sd": statistics.stdev(values) if len(values) > 1 else None}
    return spread


def table(result: dict[str, Any], space: str) -> str:
    """Markdown: mean ± s.d. over the seeds, and how far the figures move over the learning rates."""
    head = ["Method", "lr", *(title for _, title in COLUMNS)]
    lines = [" | ".join(head), " | ".join(["---", *["---:"] * (len(COLUMNS) + 1)])]
    for row in result["rows"]:
        rate = "–" if row["value"] is None else f"{row['value']:g}"
        lines.append(" | ".join([row["label"], rate, *(_cell(row[space][key]) for key, _ in COLUMNS)]))
    return "\n".join(f"| {line} |" for line in lines)


def sweep_table(result: dict[str, Any]) -> str:
    """Markdown: Learning, Forgetting and Average of every learning rate on the validation sets, one seed."""
    lines = ["Method | lr | Learning | Forgetting | Average | Held-out", "--- | ---: | ---: | ---: | ---: | ---:"]
    for row in result["rows"]:
        for rate, figures in row["sweep"].items():
            if rate != "None":
                cells = [_number(figures[key]) for key in ("learning", "forgetting", "average", "held_out")]
                mark = "**" if float(rate) == row["value"] else ""
                lines.append(" | ".join([row["label"], f"{mark}{float(rate):g}{mark}", *cells]))
    return "\n".join(f"| {line} |" for line in lines)


def _cell(figure: dict[str, Any]) -> str:
    return _number(figure["mean"]) + (f" ± {figure['sd']:.1f}" if figure["sd"] is not None else "")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _line(figures: dict[str, Any]) -> str:
    return ", ".join(f"{title} {_number(figures['own'][key])}" for key, title in COLUMNS)


MARK, END = "<!-- figures -->", "<!-- end of figures -->"


def write_docs(result: dict[str, Any], page: Path) -> None:
    """Put the tables between the marks of the page."""
    before, _, rest = page.read_text().partition(MARK)
    _, _, after = rest.partition(END)
    parts = [
        "Own label space:\n\n" + table(result, "own"),
        "Union label space (the task is not known):\n\n" + table(result, "union"),
        "Learning rates, validation sets, one seed (bold: taken):\n\n" + sweep_table(result),
    ]
    page.write_text(f"{before}{MARK}\n\n" + "\n\n".join(parts) + f"\n\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sweep", "test", "show"))
    parser.add_argument("--runs", type=Path, required=True, help="where the runs are")
    parser.add_argument("--only", nargs="+", help="labels of the grid; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="JSON to write (show)")
    parser.add_argument("--docs", type=Path, help="page whose tables are replaced (show)")
    options = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # before the workers import torch
    entries = [entry for entry in GRID if not options.only or entry.label in options.only]
    if options.what == "show":
        result = gather(entries, options.runs, options.seeds)
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")
        if options.docs:
            write_docs(result, options.docs)
        print(table(result, "own"))
        return
    jobs = sweep_jobs(entries) if options.what == "sweep" else test_jobs(entries, options.runs, options.seeds)
    run_all(jobs, options.runs, options.processes)


if __name__ == "__main__":
    main()
