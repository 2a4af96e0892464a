"""docs/performance.md from the figures that are committed: goals, scaling curves, times of methods, and a GPU's where there are.

python bench/performance.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import estimate_error
import method_times
import scaling
from method_runs import markdown

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "bench" / "results", ROOT / "docs" / "performance.md"
MISSING = "Not measured yet."

HEAD = """# Performance

Made by `python bench/performance.py` from the JSON files in [`bench/results/`](../bench/results): no figure is typed in.
[`bench/README.md`](../bench/README.md) tells how each is measured, and [`docs/kernels.md`](kernels.md) which kernel runs
when. Times on a CPU are process time of one thread, the fastest of several rounds in which rivals take turns.
"""


GOALS = """C1: the frozen layer alone takes the share of PEFT's time that the row "C1 of linear" shows, and no update costs less
than nothing. C3: the best loop is another one on every CPU; where there is AVX512-BF16, `addmm_` in bfloat16 multiplies
factors that it has rounded, while `merge_` sums in float32 and rounds once, checks first and counts what was lost. C5: what
we cut is the texts; the more images a batch has, the more of a step are products of the image tower, which all share."""


def read(name: str) -> Any:
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def where(facts: dict[str, str]) -> str:
    return (
        f"{facts['device']}, {facts['threads']} thread, torch {facts['torch']}, Triton {facts['triton']}, Python "
        f"{facts['python']}, commit {facts['commit']}."
    )


def goals() -> str:
    """Ratios on a CPU against their targets."""
    found = read("goals.json")
    if not found:
        return MISSING
    lines = [["What", "Measured", "Target", "Commit"]]
    for name, goal in found.items():
        target = "–" if goal["target"] is None else f"≤ {goal['target']:g}"
        lines.append([name.strip(), f"{goal['measured']:.3g}", target, goal["facts"]["commit"]])
    newest = list(found.values())[-1]["facts"]
    return f"{where(newest)}\n\n{GOALS}\n\n{markdown(lines)}"


def curves() -> str:
    found = read("scaling.json")
    if not found:
        return MISSING
    tables = "\n\n".join(f"### {curve['what'].capitalize()}\n\n{scaling.table(curve)}" for curve in found["curves"])
    plot = "![Time and memory against rank, tokens, classes, modules and tasks](scaling.png)"
    return f"{where(found['facts'])} The last but one column is the slope of a straight line.\n\n{plot}\n\n{tables}"


def methods() -> str:
    found = read("method_times.json")
    if not found:
        return MISSING
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("python", "torch", "open_clip_torch"))
    rounds = "One round" if found["rounds"] == 1 else f"The fastest of {found['rounds']} rounds"
    return f"{rounds} on one thread of a CPU, {versions}.\n\n{method_times.table(found)}"


def estimates() -> str:
    found = read("estimate_error.json")
    if not found:
        return MISSING
    return f"{where(found['facts'])} Operations over the rate of one product, which runs at its best; float32.\n\n" + (
        estimate_error.table(found)
    )


def gpu() -> str:
    found = read("gpu_suite.json")
    if not found:
        return f"{MISSING} On a GPU, `python bench/gpu_suite.py --out DIR` measures every goal in eight minutes."
    from gpu import report

    return f"```\n{report.table(found)}\n```"


def page() -> str:
    parts = (
        ("Goals on a CPU", goals()),
        ("Curves", curves()),
        ("A task of the embedded benchmark, by method", methods()),
        ("What `fastlora doctor --estimate` says, and what is", estimates()),
        ("On a GPU", gpu()),
    )
    return "\n\n".join([HEAD.strip(), *(f"## {title}\n\n{text}" for title, text in parts)]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
