"""Every GPU goal in one command: build, correctness on the device, ceilings, goals G1 to G11, one JSON, one table.

    python bench/gpu_suite.py --out DIR                     everything, within eight minutes
    python bench/gpu_suite.py --out DIR --only G4 G8        these goals, with facts and ceilings
    python bench/gpu_suite.py --out DIR --resume OLD.json   what OLD.json has not finished
    python bench/gpu_suite.py --out DIR --tune 120          tune first; "auto" then runs what was found fastest
    python bench/gpu_suite.py --out DIR --small             tiny shapes, on a CPU too: shows that it runs, measures nothing
    python bench/gpu_suite.py --show FILE.json              the table of a finished run

The figures go to DIR/gpu_suite.json as they come. The device's settings are left as they are.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from gpu import goals, install, parts, report, supervise  # noqa: E402
from gpu.state import NAME, State  # noqa: E402

# of all parts together, without --tune
WHOLE_SECONDS = 480.0


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    if options.show:
        _print_table(options.show)
        return 0
    if options.worker:
        return _measure(options)
    return _lead(options)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the JSON and of the tuned table")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the table of this JSON, measure nothing")
    parser.add_argument("--small", action="store_true", help="tiny shapes; needs no GPU")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="goals (G4) or parts (merge)")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep the finished parts of this JSON")
    parser.add_argument("--budget-seconds", type=float, default=WHOLE_SECONDS)
    parser.add_argument(
        "--tune", type=float, default=0.0, metavar="SECONDS", help="run fastlora's tuning before forward"
    )
    parser.add_argument("--build", choices=("auto", "always", "never"), default="auto", help="install the tree first")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.out and not options.show:
        parser.error("--out DIR is needed")
    return options


def _lead(options: argparse.Namespace) -> int:
    """The process that is started by hand: it imports no torch, so nothing on the device can take it down."""
    deadline = time.time() + options.budget_seconds
    names = parts.select(options.only, options.tune > 0)
    path = options.out.resolve() / NAME
    state = State.new(path, options.small, State.load(options.resume) if options.resume else None)
    if not options.small:
        os.environ.pop("TRITON_INTERPRET", None)  # before any process that would read it
        if not _has_gpu():
            raise SystemExit("torch sees no GPU. Say --small to run tiny shapes on the CPU.")
    state.save()
    print(f"{len(names)} parts into {path}", flush=True)
    seconds = max(options.budget_seconds - 60, 30)
    state.data["install"] = install.ensure_installed(options.build, not options.small, seconds)
    state.save()
    again = ["--budget-seconds", str(options.budget_seconds), "--tune", str(options.tune)]
    again += ["--small"] if options.small else []
    again += ["--only", *options.only] if options.only else []

    def command() -> list[str]:
        worker = [sys.executable, str(HERE / "gpu_suite.py"), "--worker", "--out", str(options.out)]
        return [*worker, "--deadline", str(deadline), *again]

    supervise.supervise(path, names, command, deadline)
    _print_table(path)
    return 0


def _has_gpu() -> bool:
    code = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 1)"
    return subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL).returncode == 0


def _measure(options: argparse.Namespace) -> int:
    """The process that measures."""
    path = options.out.resolve() / NAME
    table = path.with_name("dispatch.json")
    if options.tune:  # read at the first look-up, and again after the tuning
        os.environ.setdefault("FASTLORA_TABLE", str(table))
    install.use_source_tree()
    import torch
    from gpu.work import work

    names = parts.select(options.only, options.tune > 0)
    scale = options.budget_seconds / WHOLE_SECONDS
    shares = {name: parts.PARTS[name].seconds * max(scale, 1.0) for name in names} | {"tune": options.tune}
    # the interpreter is slow enough on a CPU
    cuda = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    return work(State.load(path), names, lambda name: parts.PARTS[name].load(), shares, options.deadline, device)


def _print_table(path: Path) -> None:
    state = State.load(path)
    state.data["goals"] = goals.goals(state.data)
    state.save()
    print(report.table(state.data))


if __name__ == "__main__":
    sys.exit(main())
