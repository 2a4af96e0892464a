"""Which versions of Python, torch and Triton fastlora was installed with and tested on, and what came of it.

    make versions                                                  installs and tests every pair in noxfile.py, one by one
    python bench/versions.py note --asked 2.11 --wheel NAME --junit FILE     what noxfile.py calls after each
    python bench/versions.py show                                  the table of docs/install.md again

A row is a Python with the oldest or the newest torch; the versions in it are those that pip chose.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from datetime import date
from pathlib import Path
from typing import Any

from method_runs import markdown, replace_between

ROOT = Path(__file__).parent.parent
RESULT, PAGE = ROOT / "bench" / "results" / "versions.json", ROOT / "docs" / "install.md"
MARKS = "<!-- versions -->", "<!-- end of versions -->"
PACKAGES = (
    "torch",
    "triton",
    "torchvision",
    "numpy",
    "safetensors",
    "open_clip_torch",
    "peft",
    "transformers",
    "pytest",
)


def counts(junit: Path) -> dict[str, Any]:
    """What pytest's report counts, and the names of what failed."""
    suites = list(ElementTree.parse(junit).getroot().iter("testsuite"))
    total = {
        what: sum(int(suite.get(what, 0)) for suite in suites) for what in ("tests", "failures", "errors", "skipped")
    }
    failed = total["failures"] + total["errors"]
    names = [
        f"{case.get('classname')}.{case.get('name')}"
        for case in ElementTree.parse(junit).getroot().iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {
        "passed": total["tests"] - failed - total["skipped"],
        "failed": failed,
        "skipped": total["skipped"],
        "seconds": round(sum(float(suite.get("time", 0)) for suite in suites)),
        "failures": names,
    }


def row(asked: str, wheel: str, junit: Path) -> dict[str, Any]:
    """One tested environment: this one."""
    import facts

    here = facts.facts()
    return {
        "python": here["python"],
        "asked": asked,
        "wheel": wheel,
        **counts(junit),
        "packages": {name: facts.package_version(name) for name in PACKAGES},
        "device": here["device"],
        "commit": commit(),
        "date": date.today().isoformat(),
    }


def commit() -> str:
    """Of the tree; rows that were just written do not make it another one."""
    written = [f":!{path.relative_to(ROOT)}" for path in (RESULT, PAGE)]
    told = [
        subprocess.run(["git", *command], capture_output=True, text=True, cwd=ROOT).stdout.strip()
        for command in (
            ["rev-parse", "--short", "HEAD"],
            ["status", "--porcelain", "--untracked-files=no", "--", *written],
        )
    ]
    return (told[0] or "unknown") + ("-dirty" if told[1] else "")


def minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def with_row(rows: list[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows, of which the new one replaces that of the same Python and wish; by Python, then torch."""

    def key(each: dict[str, Any]) -> tuple[Any, ...]:
        return minor(each["python"]), each["asked"]

    return sorted([each for each in rows if key(each) != key(new)] + [new], key=key)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown of all rows."""
    lines = [["Python", "torch", "Triton", "numpy", "Passed", "Failed", "Skipped", "Seconds", "Date", "Commit"]]
    for each in rows:
        packages = [each["packages"][name] for name in ("torch", "triton", "numpy")]
        figures = [str(each[name]) for name in ("passed", "failed", "skipped", "seconds")]
        lines.append([each["python"], *packages, *figures, each["date"], each["commit"]])
    return markdown(lines, texts=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("note", "show"))
    parser.add_argument("--asked", help="the torch that was asked for: a version, or newest")
    parser.add_argument("--wheel", help="name of the wheel that was installed")
    parser.add_argument("--junit", type=Path, help="pytest's report")
    options = parser.parse_args()
    rows = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    if options.action == "note":
        if None in (options.asked, options.wheel, options.junit):
            parser.error("note needs --asked, --wheel and --junit")
        new = row(options.asked, options.wheel, options.junit)
        rows = with_row(rows, new)
        RESULT.write_text(json.dumps({"command": "make versions", "rows": rows}, indent=1) + "\n")
    replace_between(PAGE, *MARKS, table(rows))
    if options.action == "note" and new["failed"]:
        sys.exit(f"Python {new['python']} with torch {options.asked}: {new['failed']} tests failed")


if __name__ == "__main__":
    main()
