"""Does data choose the components? Every selecting method, trained from starts that differ in one thing, several seeds.

python bench/selection.py run --runs DIR              several processes at a time; what is there is not run again
python bench/selection.py show --runs DIR --out bench/results/selection.json --docs docs/methods.md

Each file of DIR is what `fastlora compare --selection` writes into a run. The survivors of every training are compared
with those of the first, and with what random subsets of the same sizes would share.
"""

from __future__ import annotations

import json
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from method_grid import SELECTING, Entry
from method_runs import Job, arguments, chosen, markdown, replace_between, write_json


def path_of(entry: Entry, seed: int, runs: Path) -> Path:
    return runs / f"{Job(entry, 'demo', None, seed).path(runs).name}.json"


def measure(entry: Entry, seed: int, runs: Path) -> str:
    """Train from every start, unless its file is there."""
    path = path_of(entry, seed, runs)
    if not path.exists():
        import torch

        from fastlora.continual import selection
        from fastlora.continual.config import RunConfig

        torch.set_num_threads(1)
        run = RunConfig(benchmark="demo", method=Job(entry, "demo", None, seed).config(), seed=seed)
        found = json.dumps(selection.measure(run).as_dict(), indent=1)
        path.write_text(found + "\n")
    return path.name


def run_all(entries: list[Entry], seeds: list[int], runs: Path, processes: int) -> None:
    runs.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(measure, entry, seed, runs) for seed in seeds for entry in entries]
        for count, future in enumerate(as_completed(futures), start=1):
            print(f"[{count}/{len(futures)}] {future.result()}", flush=True)


def gather(entries: list[Entry], seeds: list[int], runs: Path) -> dict[str, Any]:
    """Methods whose seeds are all there; each comparison has one value a seed."""
    methods = []
    for entry in entries:
        paths = [path_of(entry, seed, runs) for seed in seeds]
        if all(path.exists() for path in paths):
            found = [json.loads(path.read_text()) for path in paths]
            comparisons = [together(parts) for parts in zip(*(each["comparisons"] for each in found))]
            head = {"label": entry.label, "method": found[0]["config"]["method"], "tasks": found[0]["tasks"]}
            methods.append(head | {"comparisons": comparisons})
    from fastlora.continual.manifest import versions

    return {"command": "python bench/selection.py", "seeds": seeds, "versions": versions(), "methods": methods}


def together(seeds: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """One comparison: a list over the seeds in place of each figure; towers as (overlaps, chances)."""
    figures = {key: [each[key] for each in seeds] for key in ("jaccard", "chance", "rank_correlation")}
    towers = {tower: list(zip(*(each["towers"][tower] for each in seeds))) for tower in ("vision", "text")}
    return {"name": seeds[0]["name"], **figures, "towers": towers}


def table(result: dict[str, Any]) -> str:
    """Markdown: means over the seeds, the spread of the overlap, the towers apart."""
    lines = [["Method", "Start that differs", "Jaccard", "chance", "vision", "text", "correlation of kept ranks"]]
    for method in result["methods"]:
        for each in method["comparisons"]:
            spread = statistics.stdev(each["jaccard"]) if len(each["jaccard"]) > 1 else 0.0
            cells = [f"{statistics.fmean(each['jaccard']):.3f} ± {spread:.3f}", _mean(each["chance"])]
            cells += [f"{_mean(overlap)} ({_mean(chance)})" for overlap, chance in each["towers"].values()]
            lines.append([method["label"], each["name"], *cells, _mean(each["rank_correlation"], 2)])
    return markdown(lines, texts=2)


def _mean(values: list[float | None], digits: int = 3) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.{digits}f}" if known else "–"


def main() -> None:
    parser = arguments(__doc__, ("run", "show"), seeds=[0, 1, 2])
    options = parser.parse_args()
    entries = chosen(SELECTING, options.only)
    if options.what == "run":
        run_all(entries, options.seeds, options.runs, options.processes)
        return
    result = gather(entries, options.seeds, options.runs)
    write_json(result, options.out)
    if options.docs:
        replace_between(options.docs, "<!-- selection -->", "<!-- end of selection -->", table(result))
    print(table(result))


if __name__ == "__main__":
    main()
