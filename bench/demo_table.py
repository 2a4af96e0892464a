"""The README's table: CoDyRA, LoRA r = 16 and zero-shot on the embedded benchmark, several seeds, two processes at a time.

python bench/demo_table.py --out bench/results/demo.json      trains, writes the JSON, prints the Markdown table
python bench/demo_table.py --show bench/results/demo.json     prints the table of a JSON that exists
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

METHODS = ("codyra", "lora", "zero_shot")
COLUMNS = (
    ("learning", "Learning"),
    ("forgetting", "Forgetting"),
    ("last", "Last"),
    ("average", "Average"),
    ("transfer", "Transfer"),
    ("held_out_before", "Held-out before"),
    ("held_out", "after"),
    ("mean_rank", "Mean rank"),
)


def train(method: str, seed: int, out: Path) -> Path:
    """One run in a process of its own, one thread."""
    command = [
        sys.executable,
        "-m",
        "fastlora.cli",
        "train",
        "--method",
        method,
        "--seed",
        str(seed),
        "--out",
        str(out),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout[-2000:]}")
    return out


def measure(seeds: list[int], runs: Path) -> dict:
    """Train everything, and gather figures with the conditions they were measured under."""
    from fastlora.continual.compare import comparison_json, group_runs
    from fastlora.continual.saved_run import read_run

    jobs = [(method, seed) for seed in seeds for method in METHODS]
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda job: train(*job, runs / f"{job[0]}-{job[1]}"), jobs))
    finished = sorted((read_run(path) for path in paths), key=lambda run: METHODS.index(run.config["method"]["name"]))
    result = comparison_json(group_runs(finished))
    for group in result["groups"]:
        group["runs"] = [Path(path).name for path in group["runs"]]
        members = [run for run in finished if run.path.name in group["runs"]]
        group["null_model"] = members[0].manifest["null_model"]
    return {"command": "python bench/demo_table.py", "versions": finished[0].manifest["versions"], **result}


def table(result: dict) -> str:
    """Markdown, the own label space, mean and s.d. over seeds."""
    head = ["Method", *(title for _, title in COLUMNS)]
    lines = [" | ".join(head), " | ".join(["---", *["---:"] * len(COLUMNS)])]
    for group in result["groups"]:
        cells = [_cell(group["own"][key]) for key, _ in COLUMNS]
        lines.append(" | ".join([group["label"], *cells]))
    return "\n".join(f"| {line} |" for line in lines)


def _cell(figure: dict) -> str:
    if figure["mean"] is None:
        return "–"
    return f"{figure['mean']:.1f}" + (f" ± {figure['sd']:.1f}" if figure["sd"] is not None else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--runs", type=Path, help="where the runs go (default: a temporary folder)")
    parser.add_argument("--show", type=Path, help="print the table of this JSON and train nothing")
    options = parser.parse_args()
    if options.show:
        print(table(json.loads(options.show.read_text())))
        return
    with tempfile.TemporaryDirectory() as scratch:
        runs = options.runs or Path(scratch)
        runs.mkdir(parents=True, exist_ok=True)
        result = measure(options.seeds, runs)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
