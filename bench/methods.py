"""Every method on the embedded benchmark: learning rates chosen on validation sets, figures on test sets.

python bench/methods.py run --runs DIR              all of the following, a few methods at a time
python bench/methods.py sweep --runs DIR            one seed of each method and learning rate, on the validation sets
python bench/methods.py test --runs DIR             three seeds of each method at its best rate, on the test sets
python bench/methods.py show --runs DIR --out bench/results/methods.json --docs docs/methods.md --readme README.md

The best rate is that of the highest Average in the own label space: the mean over all data sets and all tasks, which
counts what is learned, what is kept, and what is still to come. The sweep starts with the rates between the first and
the last of the grid, and goes on to the neighbours of the best until it has both. Runs that are finished are not run
again.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from method_grid import GRID, Entry
from method_runs import (
    COLUMNS,
    Job,
    arguments,
    cell,
    chosen,
    markdown,
    number,
    replace_between,
    run_all,
    spread,
    write_json,
)

SWEEP_SEED = 100  # no seed of the table
README_ROWS = (
    *("zero-shot", "LoRA r=16", "LoRA r=4", "LoRA r=16, merged x 0.5", "CoDyRA", "CoDyRA, gates without gradient"),
    *("uniform shrink, merged x 0.75", "InfLoRA", "full fine-tuning", "ZSCL", "per task, task known"),
)
AT_ONCE = 8  # methods whose sweeps go together: enough that no process waits long, few enough that rows come early


def sweep_job(entry: Entry, value: float | None) -> Job:
    return Job(entry, "demo_validation", value, SWEEP_SEED)


def swept(entry: Entry, runs: Path) -> dict[float | None, dict[str, Any]]:
    """Value -> figures of its finished run on the validation sets; where nothing is to be chosen, the value is None."""
    found = {value: sweep_job(entry, value).figures(runs) for value in entry.values or (None,)}
    return {value: figures for value, figures in found.items() if figures is not None}


def to_sweep(entry: Entry, runs: Path) -> list[float | None]:
    """Values the sweep needs next: the inner ones, then the neighbours of the best; none when it is complete."""
    values, done = entry.values or (None,), swept(entry, runs)
    first = [value for value in values[1:-1] or values if value not in done]
    if first:
        return first
    best = values.index(best_value(done))
    return [value for value in values[max(best - 1, 0) : best + 2] if value not in done]


def best_value(done: dict[float | None, dict[str, Any]]) -> float | None:
    """The value with the highest Average on the validation sets."""
    return max(done, key=lambda value: done[value]["own"]["average"])


def test_jobs(entries: list[Entry], runs: Path, seeds: list[int]) -> list[Job]:
    return [Job(entry, "demo", best_value(swept(entry, runs)), seed) for seed in seeds for entry in entries]


def sweep(entries: list[Entry], runs: Path, processes: int) -> None:
    while jobs := [sweep_job(entry, value) for entry in entries for value in to_sweep(entry, runs)]:
        run_all(jobs, runs, processes)


def gather(entries: list[Entry], runs: Path, seeds: list[int]) -> dict[str, Any]:
    """Everything that is finished, with the conditions it was measured under."""
    rows = []
    for entry in entries:
        if to_sweep(entry, runs):
            continue
        tried = swept(entry, runs)
        value = best_value(tried)
        done = [job.figures(runs) for job in test_jobs([entry], runs, seeds)]
        if None in done:
            continue
        row = {
            "label": entry.label,
            "method": entry.method,
            "options": entry.options,
            "vary": entry.vary,
            "value": value,
        }
        row["sweep"] = {f"{value}": figures["own"] for value, figures in tried.items()}
        row |= {space: spread([figures[space] for figures in done]) for space in ("own", "union")}
        row["seconds"] = statistics.fmean(sum(figures["seconds"].values()) for figures in done)
        row["evaluation_share"] = statistics.fmean(
            figures["seconds"]["evaluate"] / sum(figures["seconds"].values()) for figures in done
        )
        row["held_out_curve"] = [statistics.fmean(values) for values in zip(*(f["held_out_curve"] for f in done))]
        rows.append(row)
    from fastlora.continual.manifest import versions

    return {"command": "python bench/methods.py", "seeds": seeds, "versions": versions(), "rows": rows}


def table(result: dict[str, Any], space: str) -> str:
    """Markdown: mean ± s.d. over the seeds."""
    lines = [["Method", "lr", *(title for _, title in COLUMNS)]]
    for row in result["rows"]:
        rate = "–" if row["value"] is None else f"{row['value']:g}"
        lines.append([row["label"], rate, *(cell(row[space][key]) for key, _ in COLUMNS)])
    return markdown(lines)


def sweep_table(result: dict[str, Any]) -> str:
    """Markdown: Learning, Forgetting and Average of every learning rate on the validation sets, one seed."""
    lines = [["Method", "lr", "Learning", "Forgetting", "Average", "Held-out"]]
    for row in result["rows"]:
        for rate, figures in row["sweep"].items():
            if row["value"] is not None:
                cells = [number(figures[key]) for key in ("learning", "forgetting", "average", "held_out")]
                mark = "**" if float(rate) == row["value"] else ""
                lines.append([row["label"], f"{mark}{float(rate):g}{mark}", *cells])
    return markdown(lines)


def readme_table(result: dict[str, Any]) -> str:
    """The rows that the README shows."""
    return table({"rows": [row for row in result["rows"] if row["label"] in README_ROWS]}, "own")


def write_docs(result: dict[str, Any], page: Path) -> None:
    parts = [
        "Own label space:\n\n" + table(result, "own"),
        "Union label space (the task is not known):\n\n" + table(result, "union"),
        "Learning rates, validation sets, one seed (bold: taken):\n\n" + sweep_table(result),
    ]
    replace_between(page, "<!-- figures -->", "<!-- end of figures -->", "\n\n".join(parts))


def main() -> None:
    parser = arguments(__doc__, ("run", "sweep", "test", "show"), seeds=[0, 1, 2])
    parser.add_argument("--readme", type=Path, help="page whose table of some methods is replaced (show)")
    options = parser.parse_args()
    entries = chosen(GRID, options.only)
    if options.what == "show":
        result = gather(entries, options.runs, options.seeds)
        write_json(result, options.out)
        if options.docs:
            write_docs(result, options.docs)
        if options.readme:
            replace_between(options.readme, "<!-- figures -->", "<!-- end of figures -->", readme_table(result))
        print(table(result, "own"))
        return
    at_once = AT_ONCE if options.what == "run" else len(entries)
    for start in range(0, len(entries), at_once):
        some = entries[start : start + at_once]
        if options.what in ("run", "sweep"):
            sweep(some, options.runs, options.processes)
        if options.what in ("run", "test"):
            run_all(test_jobs(some, options.runs, options.seeds), options.runs, options.processes)


if __name__ == "__main__":
    main()
