"""Instructions that the extension executes on a CPU, counted by Valgrind: what no busy machine disturbs.

    python bench/instruction_counts.py --out bench/results/instruction_counts.json --docs docs/merge.md

Counted is the installed extension itself, with the flags that CMakeLists.txt gave it, in calls of two sizes: what they
differ by knows no start-up. Caches are simulated, so that the bytes that come from memory are counted too. AVX-512 is not
among the levels: Valgrind does not know it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from method_runs import markdown, replace_between, write_json

from fastlora import build_info
from fastlora.build import extension

RESULT = Path(__file__).parent / "results" / "instruction_counts.json"
CALLS = Path(__file__).with_name("instruction_calls.py")
MARKS = ("<!-- instructions -->", "<!-- end of instructions -->")
LEVELS = {"avx2": "AVX2", "scalar": "plain C++"}
DTYPES = ("float16", "bfloat16", "float32")
WORK = {
    "nearest": "nearest",
    "stochastic": "stochastic",
    "residual": "residual, weight's dtype",
    "int8": "residual, int8",
    "check": "the check before any of them",
}
# what calls differ by: of the merge, of the optimizer
RANKS, ROWS = (4, 12), (64, 128)
ELEMENTS, GATES = (4096, 20480), (16, 2064)
COLS = {"avx2": 512, "scalar": 64}  # plain C++ takes twenty times as many, and as long to count
LINE, CACHE = 64, 65536  # bytes
CACHES = ("--cache-sim=yes", f"--I1={CACHE},8,{LINE}", f"--D1={CACHE},8,{LINE}", f"--LL={16 * CACHE},16,{LINE}")
# counters are cleared before the one libc function and written before the other; instruction_calls.py calls both
COUNTED = ("--zero-before=getpgrp", "--dump-before=getppid", "--combine-dumps=yes")
VALGRIND = ("valgrind", "-q", "--vgdb=no", "--tool=callgrind")

Calls = dict[str, tuple[str, dict[str, Any]]]  # function of instruction_calls.py and its options
Events = dict[str, dict[str, int]]  # of each call, by callgrind's names


def obstacle() -> str:
    """Why nothing can be counted here, or ""."""
    if extension() is None:
        return f"no extension: {build_info()['extension_reason']}"
    if "avx2" not in extension().simd_levels():
        return "the counts are those of x86-64 with AVX2"
    if shutil.which("valgrind") is None:
        return "no valgrind on PATH; the package of that name has it"
    tried = subprocess.run([*VALGRIND, "--callgrind-out-file=/dev/null", "true"], capture_output=True, text=True)
    return f"valgrind does not run here: {tried.stderr.strip()}" if tried.returncode else ""


def merge_calls(level: str) -> Calls:
    calls = {}
    for work in WORK:
        for dtype in DTYPES:
            if (work, dtype) == ("stochastic", "float32"):
                continue  # float32 drops nothing, so nothing is drawn for it
            for rank in RANKS:
                for rows in ROWS:
                    options = {"level": level, "rounding": work, "dtype": dtype, "rank": rank, "rows": rows}
                    calls[f"{level} {work} {dtype} {rank} {rows}"] = ("merge", options | {"cols": COLS[level]})
    return calls


def adamw_calls(level: str) -> Calls:
    sizes = {"base": (ELEMENTS[0], GATES[0]), "elements": (ELEMENTS[1], GATES[0]), "gates": (ELEMENTS[0], GATES[1])}
    return {
        f"{level} adamw {name}": ("adamw", {"level": level, "elements": elements, "gates": gates})
        for name, (elements, gates) in sizes.items()
    }


def run(calls: Calls) -> Events:
    """All calls in one process under Valgrind."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "callgrind.out"
        # -I -S: whatever the environment holds, the same modules. LD_BIND_NOW: no call looks a symbol up.
        program = [sys.executable, "-I", "-S", str(CALLS), extension().__file__, json.dumps(list(calls.values()))]
        command = [*VALGRIND, *CACHES, *COUNTED, f"--callgrind-out-file={out}", *program]
        environment = os.environ | {"LD_BIND_NOW": "1", "PYTHONHASHSEED": "0"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise RuntimeError(f"{CALLS.name} under Valgrind exited with {done.returncode}: {done.stdout}{done.stderr}")
        text = out.read_text()
    names = re.search(r"^events: (.+)$", text, re.M).group(1).split()
    parts = text.split("\ndesc: Trigger: --dump-before=getppid")[1:]
    if len(parts) != len(calls):
        raise RuntimeError(f"Valgrind wrote the counts of {len(parts)} calls; {len(calls)} were made. {done.stderr}")
    totals = [re.search(r"^(?:summary|totals): ([\d ]+)$", part, re.M).group(1).split() for part in parts]
    return {call: dict(zip(names, map(int, total))) for call, total in zip(calls, totals)}


def instructions(events: dict[str, int]) -> int:
    return events["Ir"]


def from_memory(events: dict[str, int]) -> int:
    """Bytes of the lines that the simulated cache did not have."""
    return LINE * (events["D1mr"] + events["D1mw"])


def merge_figures(found: Events, name: str, cols: int) -> dict[str, float]:
    """Of one element of the weight: instructions without any rank, for each kept rank; bytes, at the lower rank."""

    def slope(what: Callable[[dict[str, int]], int], rank: int) -> float:
        few, many = (what(found[f"{name} {rank} {rows}"]) for rows in ROWS)
        return (many - few) / ((ROWS[1] - ROWS[0]) * cols)

    low, high = (slope(instructions, rank) for rank in RANKS)
    rank = (high - low) / (RANKS[1] - RANKS[0])
    return {"element": low - RANKS[0] * rank, "rank": rank, "bytes": slope(from_memory, RANKS[0])}


def adamw_figures(found: Events, name: str) -> dict[str, float]:
    """Of one parameter: instructions, and bytes. gate: instructions of a parameter that is a gate."""

    def slope(what: Callable[[dict[str, int]], int], more: str, sizes: tuple[int, int]) -> float:
        return (what(found[f"{name} {more}"]) - what(found[f"{name} base"])) / (sizes[1] - sizes[0])

    return {
        "element": slope(instructions, "elements", ELEMENTS),
        "gate": slope(instructions, "gates", GATES),
        "bytes": slope(from_memory, "elements", ELEMENTS),
    }


def measure() -> dict[str, Any]:
    """Figures by "level work dtype" and "level adamw"; bytes with vectors alone, since the loops are the same ones."""
    merges = {level: merge_calls(level) for level in LEVELS}
    found = run({call: what for level in LEVELS for call, what in (merges[level] | adamw_calls(level)).items()})
    figures = {}
    for level, calls in merges.items():
        for name in dict.fromkeys(call.rsplit(" ", 2)[0] for call in calls):
            figures[name] = merge_figures(found, name, COLS[level])
        figures[f"{level} adamw"] = adamw_figures(found, f"{level} adamw")
    rounded = {
        name: {key: round(value, 4) for key, value in each.items() if key != "bytes" or name.startswith("avx2")}
        for name, each in figures.items()
    }
    return {"command": "python bench/instruction_counts.py", "compiler": compiler(), "figures": rounded}


def compiler() -> str:
    """Name and version; GCC gives its number alone."""
    told = build_info()["compiler"]
    return f"GCC {told}" if told[0].isdigit() else told


def table(result: dict[str, Any]) -> str:
    """Markdown: the merge by way of rounding and dtype, and a sentence about the optimizer."""
    figures = result["figures"]

    def cell(level: str, work: str, dtype: str, key: str, digits: int) -> str:
        figure = figures.get(f"{level} {work} {dtype}")
        return f"{figure[key]:.{digits}f}" if figure else "–"

    columns = [(level, dtype) for level in LEVELS for dtype in DTYPES]
    lines = [["", *(f"{LEVELS[level]}, {dtype}" for level, dtype in columns), "bytes, float16"]]
    for work, label in WORK.items():
        counts = [cell(*column[:1], work, column[1], "element", 1) for column in columns]
        lines.append([label, *counts, cell("avx2", work, "float16", "bytes", 0)])
    ranks = [cell(level, "nearest", dtype, "rank", 2) for level, dtype in columns]
    lines.append(["each kept rank, beside that", *ranks, "–"])
    vector, plain = figures["avx2 adamw"], figures["scalar adamw"]
    optimizer = (
        f"The optimizer's step takes {vector['element']:.2f} instructions for a parameter with AVX2, {plain['element']:.1f} "
        f"in plain C++, and {vector['bytes']:.0f} bytes from memory; for a gate with its proximal step "
        f"{vector['gate']:.1f} and {plain['gate']:.1f}. Compiled by {result['compiler']}."
    )
    return f"{markdown(lines)}\n\n{optimizer}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--docs", type=Path, help="page whose table is replaced")
    options = parser.parse_args()
    if why := obstacle():
        parser.error(why)
    result = measure()
    write_json(result, options.out)
    if options.docs:
        replace_between(options.docs, *MARKS, table(result))
    print(table(result))


if __name__ == "__main__":
    main()
