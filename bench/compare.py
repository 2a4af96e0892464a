"""Two commits on the CPU, in turn: ratios of process time with their spread, and what can be counted.

    python bench/compare.py BASE HEAD                   two commits
    python bench/compare.py BASE .                      a commit and the working tree as it is
    python bench/compare.py HEAD HEAD                   the same twice: how far from 1 chance goes here

Each commit is checked out beside the repository's own tree and its extension is built, unless its sources are those of
the working tree. Then both measure the calls of compare_set.py in a process of their own, in turn, BASE first in one
round and HEAD first in the next. A ratio is HEAD / BASE of the fastest calls of a round; below 1 HEAD is faster. Counts
(operations of torch, bytes saved for backward) do not vary: a change is told whatever its size.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from method_runs import markdown, write_json

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
SOURCES = ("csrc", "CMakeLists.txt", "setup.py")  # what the extension is built from
Measured = dict[str, Any]


def git(*command: str) -> str:
    done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"git {' '.join(command)}: {done.stderr.strip() or 'failed'}")
    return done.stdout.strip()


def commit_of(name: str) -> str | None:
    """The full hash, None for the working tree."""
    return None if name == "." else git("rev-parse", "--verify", f"{name}^{{commit}}")


@contextlib.contextmanager
def checked_out(name: str) -> Iterator[Path]:
    """A directory with `fastlora` of this commit in it, extension included; it is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="fastlora-compare-") as temporary:
        tree = Path(temporary) / "tree"
        commit = commit_of(name)
        if commit is None:
            tree.mkdir()
            for package in ("fastlora", "triton_kernels"):
                shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            git("worktree", "add", "--quiet", "--detach", str(tree), commit)
        try:
            if commit is not None:
                give_extension(tree, commit)
            (tree / "fastlora" / "triton_kernels").symlink_to(tree / "triton_kernels")  # as setup.py installs it
            yield tree
        finally:
            if commit is not None:
                git("worktree", "remove", "--force", str(tree))


def give_extension(tree: Path, commit: str) -> None:
    """Copy the working tree's, where it is built from the same sources, else build."""
    built = [*ROOT.glob("fastlora/_C*.so"), *ROOT.glob("fastlora/_build_info.json")]
    same = subprocess.run(["git", "diff", "--quiet", commit, "--", *SOURCES], cwd=ROOT).returncode == 0
    if same and len(built) == 2:
        for file in built:
            shutil.copy(file, tree / "fastlora")
        return
    print(f"building the extension of {commit[:9]}", file=sys.stderr, flush=True)
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    switches = {"FASTLORA_BUILD_EXT": "on", "FASTLORA_CUDA": "off"}
    done = subprocess.run(build, cwd=tree, env={**os.environ, **switches}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the extension of {commit[:9]} cannot be built:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def measure(tree: Path, small: bool) -> Measured:
    """compare_set.py of this tree's fastlora, in a process of its own."""
    command = [sys.executable, "-B", str(BENCH / "compare_set.py"), *(["--small"] if small else [])]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env={**os.environ, **threads, "PYTHONPATH": str(tree)}, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"measuring {tree} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    if not Path(found["fastlora"]).is_relative_to(tree):
        sys.exit(f"{found['fastlora']} was measured, not {tree}: another fastlora comes first on Python's path")
    return found


def compare(base: Path, head: Path, rounds: int, small: bool) -> dict[str, Any]:
    """Ratios by name, one a round, and counts as (base, head)."""
    found: list[tuple[Measured, Measured]] = []
    for number in range(rounds):
        trees = (base, head) if number % 2 == 0 else (head, base)
        measured = {id(tree): measure(tree, small) for tree in trees}
        found.append((measured[id(base)], measured[id(head)]))
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    first, last = found[0]
    seconds = [(one["seconds"], other["seconds"]) for one, other in found]
    return {
        "ratios": {name: [other[name] / one[name] for one, other in seconds] for name in first["seconds"]},
        "seconds": {name: min(one[name] for one, _ in seconds) for name in first["seconds"]},
        "counts": {name: [first["counts"][name], last["counts"][name]] for name in first["counts"]},
    }


def table(result: dict[str, Any]) -> str:
    lines = [["Call", "HEAD / BASE", "from", "to", "BASE, ms"]]
    for name, ratios in result["ratios"].items():
        spread = (statistics.median(ratios), min(ratios), max(ratios))
        lines.append([name, *(f"{value:.3f}" for value in spread), f"{result['seconds'][name] * 1e3:.2f}"])
    changed = [f"{name}: {a:,} -> {b:,}" for name, (a, b) in result["counts"].items() if a != b]
    return f"{markdown(lines)}\n\nCounts that changed: {'; '.join(changed) or 'none'}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="a commit, or . for the working tree")
    parser.add_argument("head", help="another")
    parser.add_argument("--rounds", type=int, default=6, help="processes of each (default: 6)")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; give at least 1")
    for name in (options.base, options.head):
        commit_of(name)  # before anything is built
    with checked_out(options.base) as base, checked_out(options.head) as head:
        result = compare(base, head, options.rounds, options.small)
    result |= {"base": commit_of(options.base) or "working tree", "head": commit_of(options.head) or "working tree"}
    write_json(result, options.out)
    print(table(result))


if __name__ == "__main__":
    main()
