"""What a task costs with each method: process time of a whole task of the embedded benchmark, against LoRA of rank 16.

python bench/method_times.py --out bench/results/method_times.json --docs docs/methods.md
python bench/method_times.py --show bench/results/method_times.json

The second task is timed, with all that a method does before and after its steps (designs of InfLoRA, brief fine-tunings
of PEARL, merges), and then an evaluation of the whole benchmark. One thread; methods take turns, and the fastest of
the rounds counts.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from method_grid import GRID, RULES, Entry
from method_runs import Job, markdown, replace_between, write_json

BASE = "LoRA r=16"


def timed() -> list[Entry]:
    """Rows that train a second task, which joint training does not, and the rule that docs/methods.md recommends."""
    return [entry for entry in (*GRID, RULES[-1]) if entry.method not in ("zero_shot", "joint")]


def measure(entry: Entry) -> dict[str, float]:
    """Process seconds of the second task's training, and of one evaluation after it."""
    from fastlora.continual import Trainer
    from fastlora.continual.benchmarks import benchmark
    from fastlora.continual.config import RunConfig

    config = Job(entry, "demo", None, 0).config()
    loaded = benchmark("demo").load(RunConfig(benchmark="demo", method=config))
    trainer = Trainer(*loaded, config, progress=False)
    first, second = loaded.stream.tasks[:2]
    trainer._train(1, first)
    start = time.process_time()
    trainer._train(2, second)
    middle = time.process_time()
    trainer._evaluate("after two tasks")
    return {"train": middle - start, "evaluate": time.process_time() - middle}


def measure_all(rounds: int) -> dict[str, Any]:
    import torch

    from fastlora.continual.manifest import versions

    torch.set_num_threads(1)
    found: dict[str, list[dict[str, float]]] = {entry.label: [] for entry in timed()}
    for number in range(1, rounds + 1):
        for entry in timed():
            found[entry.label].append(measure(entry))
            print(f"[{number}/{rounds}] {entry.label}: {found[entry.label][-1]['train']:.1f} s", flush=True)
    fastest = {
        label: {part: min(times[part] for times in taken) for part in ("train", "evaluate")}
        for label, taken in found.items()
    }
    return {"command": "python bench/method_times.py", "rounds": rounds, "versions": versions(), "seconds": fastest}


def table(result: dict[str, Any]) -> str:
    """Markdown: a task's training against that of LoRA, and the share of evaluation in training and evaluation."""
    lines = [["Method", f"Training of a task / {BASE}", "Seconds", "Share of evaluation"]]
    base = result["seconds"][BASE]["train"]
    for label, taken in sorted(result["seconds"].items(), key=lambda item: item[1]["train"]):
        share = taken["evaluate"] / (taken["train"] + taken["evaluate"])
        lines.append([label, f"{taken['train'] / base:.2f}", f"{taken['train']:.1f}", f"{share:.0%}"])
    return markdown(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="the fastest counts (default: 2)")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--docs", type=Path, help="page whose table is replaced")
    parser.add_argument("--show", type=Path, help="print the table of this JSON and measure nothing")
    options = parser.parse_args()
    result = json.loads(options.show.read_text()) if options.show else measure_all(options.rounds)
    write_json(result, options.out)
    if options.docs:
        replace_between(options.docs, "<!-- times -->", "<!-- end of times -->", table(result))
    print(table(result))


if __name__ == "__main__":
    main()
