"""Coverage-guided fuzzing of every reader of files (tests/fuzzed/readers.py) by atheris: one JSON, one page.

    python bench/fuzz.py                              # 10,000 inputs each: half an hour; docs/fuzzing.md
    python bench/fuzz.py --only adapter run           # their rows of it
    python bench/fuzz.py --only run --inputs 500 --dry-run --findings found     # writes nothing but what it finds
    python bench/fuzz.py --show                       # docs/fuzzing.md from the JSON that is there

Needs `pip install atheris`, which has wheels for Linux alone, and is for this one program: the test suite reads again what
fuzzing has found (tests/fuzzed/inputs), without it. Each reader runs in a process of its own, which may die.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
ROOT = Path(__file__).resolve().parent.parent
RESULT, PAGE, KEPT = ROOT / "bench/results/fuzz.json", ROOT / "docs/fuzzing.md", ROOT / "tests/fuzzed/inputs"
Found = dict[str, Any]

# ---- in the process of one reader


def work(name: str, inputs: int, seed: int, corpus: Path, findings: Path) -> None:
    """Never comes back: libFuzzer ends the process."""
    import atheris
    from fuzz_mutations import WORDS, mutated

    sys.path.insert(0, str(ROOT / "tests"))
    with atheris.instrument_imports(include=["fastlora"]):
        import torch
        from fuzzed.contract import Trial, little_memory
        from fuzzed.readers import READERS
    torch.set_num_threads(1)
    scratch = "/dev/shm" if os.path.isdir("/dev/shm") else None
    trial = Trial(READERS[name], Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-", dir=scratch)))
    for given in trial.seeds():
        (corpus / hashlib.sha256(given).hexdigest()[:16]).write_bytes(given)
    (corpus.parent / "words").write_text("".join(f'"{_escaped(word)}"\n' for word in WORDS if len(word) < 60))

    def one(given: bytes) -> None:
        found = trial.read(given)
        if found is not None:
            keep(findings, given, *found)
        if trial.inputs % 100 == 0 or trial.inputs >= inputs:
            counts = {"inputs": trial.inputs, "errors": trial.errors, "longest_ms": round(1000 * trial.longest, 1)}
            (corpus.parent / "counts.json").write_text(json.dumps(counts))

    def mutate(given: bytes, most: int, seed: int) -> bytes:
        choose = random.Random(seed)
        if choose.random() < 0.4:
            return atheris.Mutate(given, most)
        return (given[:1] + mutated(given[1:].decode("latin1"), choose).encode("latin1", "replace"))[:most]

    options = (f"-runs={inputs}", f"-seed={seed}", f"-dict={corpus.parent / 'words'}", "-timeout=20", "-rss_limit_mb=6000",
               "-max_len=20000", "-mutate_depth=2", "-len_control=0", "-print_final_stats=1", f"-artifact_prefix={findings}/")  # fmt: skip
    atheris.Setup([sys.argv[0], str(corpus), *options], one, custom_mutator=mutate)
    with little_memory():
        atheris.Fuzz()


def keep(findings: Path, given: bytes, kind: str, place: str, text: str) -> None:
    """The shortest input for each promise that was broken, and what was seen."""
    path = findings / re.sub(r"\W+", "-", f"{kind}-{place}")
    if not path.exists() or len(given) < path.stat().st_size:
        path.write_bytes(given)
        path.with_suffix(".txt").write_text(f"{kind} at {place}\n{text}\n")


def _escaped(word: str) -> str:
    return "".join(c if c.isalnum() else f"\\x{ord(c):02x}" for c in word)


# ---- all of them


def fuzz(name: str, inputs: int, seed: int, findings: Path) -> Found:
    """The figures of one reader."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        findings.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, "--work", name, str(inputs), str(seed), str(corpus), str(findings)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
        seconds = time.perf_counter() - started
        counts = Path(folder) / "counts.json"
        if not counts.exists():
            raise SystemExit(f"{name} could not be fuzzed:\n{done.stderr[-3000:]}")
        found = json.loads(counts.read_text())
    reports = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", done.stderr)
    found |= dict(zip(("edges", "features", "corpus"), map(int, reports[-1])))
    found |= {"seconds": round(seconds, 1), "died": done.returncode != 0}
    found["findings"] = sorted(path.read_text().splitlines()[0] for path in findings.glob("*.txt"))
    if found["died"]:
        (findings / "death").write_text(done.stderr[-5000:])
    return found


def measure(names: list[str], inputs: int, findings: Path) -> Found:
    from facts import facts

    def tell(name: str) -> tuple[str, Found]:
        found = fuzz(name, inputs, 1, findings / name)
        print(f"{name}: {json.dumps(found)}", flush=True)
        return name, found

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1))) as several:
        readers = dict(several.map(tell, names))
    version = importlib.metadata.version("atheris")
    return {"facts": facts(), "atheris": version, "inputs": inputs, "readers": readers}


def page(found: Found) -> str:
    sys.path.insert(0, str(ROOT / "tests"))
    from fuzzed.readers import READERS
    from method_runs import markdown

    rows = [
        [
            "read",
            "inputs",
            "of these refused",
            "edges",
            "seconds",
            "longest, ms",
            "findings left",
            "mended, kept as tests",
        ]
    ]
    for name, each in found["readers"].items():
        left = len(each["findings"]) + each["died"]
        cells = [
            each["inputs"],
            each["errors"],
            each["edges"],
            round(each["seconds"]),
            each["longest_ms"],
            left,
            kept(name),
        ]
        rows.append([READERS[name].what, *(f"{cell:,}" for cell in cells)])
    total = sum(each["inputs"] for each in found["readers"].values())
    where = "Measured on {device}; Python {python}, torch {torch}, atheris {atheris}; commit {commit}.".format(
        **found["facts"], atheris=found["atheris"]
    )
    head = HEAD.strip().format(total=f"{total:,}", readers=len(found["readers"]))
    return f"{head}\n\n{markdown(rows)}\n\n{where}\n"


def kept(name: str) -> int:
    return sum(1 for _ in (KEPT / name).glob("*"))


HEAD = """
# Fuzzing

Made by `python bench/fuzz.py` from what it finds; no figure is typed in. Every file that comes from elsewhere is read
by [a reader of this table](../tests/fuzzed/readers.py), and each was given inputs that
[atheris](https://github.com/google/atheris) makes out of good files, guided by the lines of fastlora that it reaches.
Lengths and checksums are made right in half of them: else hardly one would come past these.

The promise, [in words that a program checks](../tests/fuzzed/contract.py): whatever the bytes, the reader returns, or raises
ValueError or OSError with the name of the file, within five seconds and 512 MB; no other error, no crash, no hang. A
header may claim 2^60 bytes.

**{total} inputs, {readers} readers.** *Edges* are the branches of fastlora's own code that were taken. *Refused* inputs
ended in an error for users, as they should; the others were read. What fuzzing had found before is mended, and the test
suite reads the very inputs again (`tests/fuzzed/inputs`). MATLAB files are not in the table: scipy reads them, dies of 3 in 100
damaged ones, and so does it in a process of its own.
"""


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        name, inputs, seed, corpus, findings = sys.argv[2:]
        work(name, int(inputs), int(seed), Path(corpus), Path(findings))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="READER", help="the rows of these")
    parser.add_argument("--inputs", type=int, default=10_000, help="for each reader")
    parser.add_argument("--findings", type=Path, help="folder for inputs that break a promise")
    parser.add_argument("--dry-run", action="store_true", help="write neither JSON nor page")
    parser.add_argument("--show", action="store_true", help="the page from the JSON that is there")
    options = parser.parse_args()
    if not options.show:
        sys.path.insert(0, str(ROOT / "tests"))
        from fuzzed.readers import READERS

        findings = options.findings or Path(tempfile.mkdtemp(prefix="findings-"))
        print(f"findings go to {findings}")
        result = measure(options.only or list(READERS), options.inputs, findings)
        if options.dry_run:
            return
        if options.only:
            earlier = json.loads(RESULT.read_text())["readers"]
            result["readers"] = {name: (earlier | result["readers"])[name] for name in READERS}
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    PAGE.write_text(page(json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()
