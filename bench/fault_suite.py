"""Every fault of tests/faults, put to fastlora and, where it has something of the kind, to PEFT: one JSON, one page.

    python bench/fault_suite.py                    # all, with the counts of the published table: a quarter of an hour
    python bench/fault_suite.py --small            # with those of the test suite: a minute; writes nothing
    python bench/fault_suite.py --only disk_full   # some, small; writes nothing
    python bench/fault_suite.py --show             # docs/faults.md from the JSON that is there

No outcome is typed in: each is found out in a process of its own, which may die.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: its kernels then run on CPU tensors
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
from facts import facts  # noqa: E402
from faults.case import VERDICTS, Case, Outcome  # noqa: E402
from faults.every import in_groups  # noqa: E402
from faults.planted import BUGS  # noqa: E402
from method_runs import markdown  # noqa: E402

RESULT, PAGE = ROOT / "bench/results/faults.json", ROOT / "docs/faults.md"
PACKAGES = ("peft", "safetensors", "open_clip_torch", "numpy")
Found = dict[str, Any]

# ---- finding out


def find_out(cases: list[Case], small: bool) -> dict[str, Found]:
    """The outcomes by name, told as they come."""
    import peft.tuners.lora  # noqa: F401  here, so that no process which finds something out has to

    found: dict[str, Found] = {}
    for case in cases:
        count = case.few if small else case.many
        entry: Found = {"group": case.group, "what": case.what, "must": case.must, "count": count}
        entry["ours"], entry["seconds"] = timed(partial(case.outcome, count))
        theirs = partial(case.outcome_of_peft, count)
        entry["peft"] = timed(theirs)[0] if case.theirs else None
        found[case.name] = entry
        told = f"; PEFT: {entry['peft']['verdict']}" if entry["peft"] else ""
        print(f"{entry['seconds']:7.1f} s  {case.name}: {entry['ours']['verdict']}{told}", flush=True)
    return found


def timed(run: Callable[[], Outcome]) -> tuple[Found, float]:
    started = time.perf_counter()
    outcome = asdict(run())
    return outcome, round(time.perf_counter() - started, 2)


def find_bugs(cases: dict[str, Case]) -> dict[str, Found]:
    return {
        bug.what: {"case": bug.case, "verdict": cases[bug.case].outcome(bug.count, bug.plant).verdict} for bug in BUGS
    }


def measure() -> Found:
    started = time.perf_counter()
    cases = {case.name: case for group in in_groups().values() for case in group}
    found: Found = {"facts": facts() | {"cores": str(os.cpu_count())}, "packages": {}}
    found["packages"] = {name: importlib.metadata.version(name) for name in PACKAGES}
    found["cases"] = find_out(list(cases.values()), small=False)
    found["planted"] = find_bugs(cases)
    found["minutes"] = round((time.perf_counter() - started) / 60, 1)
    return found


# ---- the page


def page(found: Found) -> str:
    cases, versions = found["cases"], found["packages"]
    parts = [HEAD.strip(), summary(found), "## Figures", figures(found)]
    for title in dict.fromkeys(case["group"] for case in cases.values()):
        parts += [f"## {title.capitalize()}", table([case for case in cases.values() if case["group"] == title])]
    parts += ["## Planted bugs", planted(found), "## Not measured", NOT_MEASURED.strip()]
    where = (
        "Measured on {device}, {cores} cores, without a GPU; Python {python}, torch {torch}, Triton {triton}".format(
            **found["facts"]
        )
    )
    others = ", ".join(f"{name} {version}" for name, version in versions.items())
    parts.append(f"{where}, {others}; commit {found['facts']['commit']}; {found['minutes']:g} minutes.")
    return "\n\n".join(parts) + "\n"


def summary(found: Found) -> str:
    """Headline, and how many of each group ended how."""
    cases = list(found["cases"].values())
    both = [case for case in cases if case["peft"]]
    ours, theirs = count(cases, "ours", "survived"), count(both, "peft", "survived")
    head = (
        f"**{ours} of {len(cases)} faults survived.** Of the {len(both)} that PEFT {found['packages']['peft']} has "
        f"something of the kind for, it survives {theirs} and fastlora {count(both, 'ours', 'survived')}."
    )
    lines = [["", "faults", *VERDICTS]]
    for title in dict.fromkeys(case["group"] for case in cases):
        lines.append(_counted(title, [case for case in cases if case["group"] == title], "ours"))
    lines += [_counted("**all**", cases, "ours"), _counted("fastlora, where PEFT has it too", both, "ours")]
    lines.append(_counted("PEFT", both, "peft"))
    return f"{head}\n\n{markdown(lines)}"


def _counted(title: str, cases: list[Found], side: str) -> list[str]:
    return [title, str(len(cases)), *(str(count(cases, side, verdict) or "–") for verdict in VERDICTS)]


def count(cases: list[Found], side: str, verdict: str) -> int:
    return sum(case[side]["verdict"] == verdict for case in cases)


def table(cases: list[Found]) -> str:
    lines = [["what is done", "what must happen", "fastlora", "PEFT"]]
    for case in cases:
        times = f" ({case['count']:,} times)" if case["count"] > 1 else ""
        lines.append([f"{case['what'].rstrip('.')}{times}", case["must"], cell(case["ours"]), cell(case["peft"])])
    return markdown([[each.replace("|", "\\|") for each in line] for line in lines], 4)


def cell(outcome: Found | None) -> str:
    """The verdict; what was seen where it is not plainly survived."""
    if outcome is None:
        return "–"
    if outcome["verdict"] == "survived":
        return "survived"
    return f"**{outcome['verdict']}**: {outcome['seen']}"


def figures(found: Found) -> str:
    def of(name: str, side: str = "ours") -> dict[str, float]:
        return found["cases"][name][side]["counts"]

    def flips(name: str) -> str:
        return f"{of(name)['found']:,} of {of(name)['flips']:,}"

    merged, theirs = of("many_merges_with_residuals"), of("many_merges_with_residuals", "peft")
    most = found["cases"]["many_merges_with_residuals"]["count"]

    def errors(merges: int) -> str:
        parts = []
        for name in ("float16", "bfloat16"):
            floor, ours = (merged[f"{name}, same{what}, {merges} merges, %"] for what in (", cast once", ""))
            peft = theirs[f"{name}, {merges} merges, %"]
            parts.append(f"{name} {ours:.2f} % (the exact sum, cast once, {floor:.2f}; PEFT {peft:.2f})")
        return "; ".join(parts)

    undone, undone_by_peft = of("merges_and_unmerges"), found["cases"]["merges_and_unmerges"]["peft"]["seen"]
    flipped = ("flipped_bit_in_an_adapter_file", "flipped_bit_in_a_journal", "flipped_bit_in_a_commit_point")
    killed = ("killed_while_an_adapter_is_saved", "killed_while_a_task_is_written", "killed_between_journal_and_merge")
    saved_by_peft = found["cases"]["killed_while_an_adapter_is_saved"]["peft"]["seen"]
    guarded = ("merges_beside_guard_pages", "optimizer_steps_beside_guard_pages", "kernels_beside_guard_pages")
    runs = of("same_bits_in_every_run")
    agreed = of("two_processes_and_three_tasks")
    fuzzed = of("readers_of_mutated_files")
    caught = sum(bug["verdict"] != "survived" for bug in found["planted"].values())
    lines = [
        ["figure", "measured", "how"],
        ["kill -9 of a training run, resumed to the same bits",
         f"{of('killed_while_training')['kills']:,} of {found['cases']['killed_while_training']['count']:,}",
         f"{of('killed_while_training')['runs']:,} runs of three tasks on a tiny CLIP, each killed at random moments and "
         "started again until it ended; weights, figures, tables, log and adapters compared"],
        ["kill -9 while saving, appending to a journal, learning and merging task by task",
         ", ".join(f"{of(name)['kills']:,}" for name in killed) + ", none with a mixed, lost or doubled update",
         f"files of 2 MB; PEFT, saving: {saved_by_peft}"],
        ["stops at random iterations, resumed to the same bits",
         f"{of('stopped_at_a_random_step')['survived']:,} of {of('stopped_at_a_random_step')['tried']:,}", "the same run"],
        ["flipped bits that are found: adapter file, journal, commit point", ", ".join(map(flips, flipped)),
         "one random bit a trial; PEFT, adapter file: "
         f"{of(flipped[0], 'peft')['found']:,.0f} told by an error or a warning"],
        ["relative error after 10 merges", errors(10), "rank 8, ‖ΔW‖ = 1 over ViT-B/16's matrices, residuals in the "
         "weight's dtype; [merge.md](merge.md) has more"],
        [f"relative error after {most} merges", errors(most), "the same"],
        ["entries that differ after 10 merges and 10 unmerges",
         f"{undone['float16, differ']:,} (float16), {undone['bfloat16, differ']:,} (bfloat16) of {undone['entries']:,}",
         f"int8 residuals; PEFT: {undone_by_peft}"],
        ["processes, one hash", f"{runs['runs']:,} runs, {runs['hashes of merges']:,} hash of merges over 1 to 4 threads",
         f"forward, backward and step: one hash for each number of threads, {runs['hashes of steps over all numbers of threads']:,} "
         "over all"],
        ["processes that decide which ranks are dead, with the same bits",
         f"{agreed['processes']:,} over {agreed['tasks']:,} tasks, {agreed['dead']:,} ranks dead", "over gloo; the run of one "
         "process but for rounding"],
        ["shapes beside guard pages, no fault", " + ".join(f"{of(name)['shapes']:,}" for name in guarded),
         "merges in C++, optimizer steps in C++, Triton kernels by its interpreter with gradients"],
        ["mutated headers read, no crash, no hang", f"{fuzzed['files']:,}; {fuzzed['errors']:,} errors for users",
         f"adapter files, commit points, idx, pickles, JSON, lists; the longest took {fuzzed['longest ms']:g} ms"],
        ["planted bugs found", f"{caught} of {len(found['planted'])}", "below"],
    ]  # fmt: skip
    return markdown(lines, len(lines[0]))


def planted(found: Found) -> str:
    lines = [["bug in the library", "found by", "as"]]
    lines += [[what, f"`{bug['case']}`", bug["verdict"]] for what, bug in found["planted"].items()]
    return markdown(lines, len(lines[0]))


HEAD = """# Faults

Made by `make faults` (`python bench/fault_suite.py`) from what it finds out: no outcome is typed in. The cases are in
[`tests/faults/`](../tests/faults), and the test suite runs each of them, with smaller counts, at every change. A case says
what is done and what must happen, and runs in a process of its own, which may die.

*Survived* is the right result, or an error that names what is wrong with everything as it was before, bit for bit. Short of
that: an *unclear error*; *warned*, harm that a warning told of; *half done*, an error that left something changed; *silent
harm*; a *crash*, which is a death or a hang. PEFT is asked the same with its own calls and its defaults, and any error that
names the matter counts for it; what `safe_merge=True` does is told where it matters. A dash: PEFT has nothing of the kind
(gates, a journal, runs), or it was not asked."""

NOT_MEASURED = """
- Anything on a GPU: a model on cuda:1 while cuda:0 is current, merges on several streams, an unknown architecture, a driver
  that is older than the runtime. The CUDA merge is compiled for the host and run beside guard pages in `tests/csrc/`.
- More than two processes, and those of several machines; [`tests/distributed/`](../tests/distributed) has up to four.
- Loss of power. Files are synced before they are renamed, and directories after; `kill -9` does not test that.
- Triton 3.6 with numpy 2.4, whose interpreter fails by itself; `make aot` compiles for 3.6.
- Known and not noticed: a table of a run (CSV) that ends within a number, and a `config.yaml` that ends between two entries.
  Neither has a checksum; both are written in one step, and anew from the commit point.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="counts of the test suite; nothing is written")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some cases, small; nothing is written")
    parser.add_argument("--show", action="store_true", help="write the page from the JSON that is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = [case for group in in_groups().values() for case in group]
    if options.small or options.only:
        find_out([case for case in cases if not options.only or case.name in options.only], small=True)
        return
    if not options.show:
        RESULT.write_text(json.dumps(measure(), indent=1) + "\n")
    PAGE.write_text(page(json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()
