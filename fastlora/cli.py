"""The `fastlora` command.

What goes wrong is told in one message on stderr, with exit code 1, or 2 where the command line is wrong. Ctrl-C
gives 130, SIGTERM 143; a run directory stays readable.

Under torchrun `train` is one run of all processes: the first prints and writes, and what all of them find wrong is told
once.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from fastlora.continual.config import UsageError, nearest

if TYPE_CHECKING:
    from fastlora.continual.arguments import TrainArguments
    from fastlora.continual.trainer import Trainer

_ERRORS = (ValueError, TypeError, RuntimeError, OSError, ArithmeticError, ImportError)


class Terminated(KeyboardInterrupt):
    """SIGTERM; whatever handles Ctrl-C handles this."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from fastlora import __version__

        print(f"fastlora {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        return _fail("fastlora", f"no command {name!r}; accepted: {', '.join(COMMANDS)}.{nearest(name, COMMANDS)}", 2)
    try:
        with _sigterm_raises():
            return COMMANDS[name][0](rest) or 0
    except KeyboardInterrupt as interrupt:
        terminated = isinstance(interrupt, Terminated)
        code, message = (143, "terminated.") if terminated else (130, "interrupted.")
        if terminated and _processes() > 1:
            message = (
                "torchrun ended this process, as it does when another one fails (which it tells of below) or when it is "
                "stopped itself. The same command with --resume goes on from the last finished task."
            )
        return _fail(f"fastlora {name}", message, code, follows=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read us has seen enough
        return 1
    except _ERRORS as error:
        code, follows = 2 if isinstance(error, UsageError) else 1, getattr(error, "follows", False)
        return _fail(f"fastlora {name}", str(error) or type(error).__name__, code, follows)


def train(argv: Sequence[str]) -> None:
    """train a method on a benchmark: [--config FILE] [--method NAME] [--seed N | --seeds N] [--out DIR] [--resume] ..."""
    with _needs("train", "jsonargparse", "yaml"):
        from fastlora.continual.arguments import parse_train

        arguments = parse_train(argv)
    together = _processes() > 1
    if arguments.seeds and together:
        raise UsageError("--seeds starts processes of its own; under torchrun give one --seed.")
    if not arguments.dry_run and arguments.out.parent == Path("runs"):
        arguments.out.parent.mkdir(exist_ok=True)
    if together:
        _train_together(arguments)
    elif arguments.dry_run:
        print(_plan(arguments))
    elif arguments.seeds:
        _train_seeds(arguments)
    elif _to_be_trained(arguments):
        _train_one(arguments)


def _train_together(arguments: TrainArguments) -> None:
    """As one of the processes that torchrun started; the first alone prints and draws."""
    from fastlora.continual import distributed

    world = distributed.join(arguments.run.device)
    if arguments.dry_run:
        plan = _plan(arguments)
        if world.first:
            print(plan)
    elif world.from_first(lambda: _to_be_trained(arguments)):
        _train_one(arguments, world.first)
    distributed.leave(world)


def _to_be_trained(arguments: TrainArguments) -> bool:
    """Whether anything is left to do; looked at before torch and the benchmark take their seconds."""
    out = arguments.out
    from fastlora.continual.resume import finished_already
    from fastlora.continual.run_dir import check_new_directory, check_run_directory

    if arguments.resume and finished_already(out, arguments.run):
        print(f"{out} is finished already; nothing was trained.")
        if not (out / "report.html").exists():
            report([str(out)])
        else:
            _print_run(out)
        return False
    (check_run_directory if arguments.resume and out.exists() else check_new_directory)(out)
    return True


def _train_one(arguments: TrainArguments, first: bool = True) -> None:
    trainer, out = _trainer(arguments), arguments.out
    with _needs("train", "matplotlib"):
        from fastlora.continual.report import write_report
    try:
        trainer.fit()
    except BaseException:
        if first and (out / "manifest.json").exists():
            print(
                f"{out} holds the finished tasks; `fastlora report {out}` shows them, and the same command with "
                "--resume goes on from there.",
                file=sys.stderr,
            )
        raise
    if first:
        write_report(out)
        _print_run(out)


def _train_seeds(arguments: TrainArguments) -> None:
    from fastlora.continual import seeds

    seeds.check_directories(arguments)
    processes = arguments.processes or seeds.default_processes(arguments.run.device)
    codes = seeds.run_all(seeds.commands(arguments), processes, arguments.run.method.name)
    finished = [arguments.out / f"seed{seed}" for seed, code in codes.items() if code == 0]
    if finished:
        from fastlora.continual.compare import comparison_text, group_runs
        from fastlora.continual.saved_run import read_run

        print(comparison_text(group_runs([read_run(path) for path in finished])))
        print("\nReports: " + ", ".join(str(path / "report.html") for path in finished))
    failed = [str(seed) for seed, code in codes.items() if code != 0]
    if failed:
        raise RuntimeError(
            f"seed {', '.join(failed)} of {len(codes)} failed; the others are whole in {arguments.out}. The same command "
            "with --resume goes on with what is not finished."
        )


def _plan(arguments: TrainArguments) -> str:
    trainer = _trainer(arguments)
    from fastlora.continual.dry_run import plan_text

    return plan_text(trainer.plan())


def _trainer(arguments: TrainArguments) -> Trainer:
    with _needs("train", "open_clip", "rich", "sklearn"):
        from fastlora.continual.benchmarks import benchmark
        from fastlora.continual.trainer import Trainer
    config = arguments.run
    loaded = benchmark(config.benchmark).load(config)
    out = None if arguments.dry_run else arguments.out
    return Trainer(*loaded, config=config, out=out, resume=arguments.resume)


def evaluate(argv: Sequence[str]) -> None:
    """evaluate the model of a run again: RUN [--task N]"""
    parser = _parser("eval", evaluate)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument(
        "--task", type=int, help="the model after this task, 0 for the base model (default: the last one)"
    )
    options = parser.parse_args(argv)
    from fastlora.continual.saved_run import read_run
    from fastlora.continual.tables import text_table

    run = read_run(options.run)
    with _needs("eval", "open_clip", "sklearn"):
        from fastlora.continual import evaluation, precision, restore
        from fastlora.continual.benchmarks import benchmark
    loaded = benchmark(run.config["benchmark"]).load(run.run_config)
    restore.check_same_tests(run, loaded.stream)
    number = run.record.finished_tasks if options.task is None else options.task
    method = restore.method_of(run)
    source = restore.restore(loaded.model, run, number, method)
    model_for = method.evaluation_model if method.per_dataset else None
    how = {"batch_size": run.config["eval_batch_size"], "dtype": precision.DTYPES[run.run_config.dtype]}
    result = evaluation.evaluate(*loaded, model_for=model_for, **how)
    now = {"own": result.own, "union": result.union}
    print(f"{options.run} after task {number}, from {source}, in {result.seconds:.1f} s")
    rows = [[space, *(f"{value:.1f}" for value in values)] for space, values in now.items()]
    print(text_table(["accuracy %", *run.record.tasks], rows))
    if result.held_out is not None:
        print(f"  held-out {result.held_out:.1f} %")
    recorded = {"own": run.record.own[number], "union": run.record.union[number]}
    gap = max(abs(a - b) for space in now for a, b in zip(now[space], recorded[space]))
    print("  equal to the recorded row" if gap == 0 else f"  differs from the recorded row by up to {gap:.2f} points")


def report(argv: Sequence[str]) -> None:
    """write the page and the plots of a run, and print its tables: RUN"""
    parser = _parser("report", report)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory; an unfinished one will do")
    options = parser.parse_args(argv)
    with _needs("report", "matplotlib", "yaml"):
        from fastlora.continual.report import write_report
    write_report(options.run)
    _print_run(options.run)


def compare(argv: Sequence[str]) -> None:
    """put runs side by side, seeds of one method together: RUN RUN ... [--out DIR|FILE] [--sort KEY] [--json] [--selection]"""
    parser = _parser("compare", compare)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories of one benchmark")
    parser.add_argument(
        "--out", type=Path, metavar="PATH", help="a directory for compare.html and its plots, FILE.html or FILE.png"
    )
    parser.add_argument(
        "--sort", default="given", metavar="KEY", help="order: given, label, learning, forgetting, last, held_out, ..."
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    parser.add_argument(
        "--selection",
        action="store_true",
        help="train the first task of each run again, on other data and from other starts, to see what chooses the "
        "components that survive; written to RUN/selection.json",
    )
    options = parser.parse_args(argv)
    if options.selection:
        if options.out:
            raise UsageError("--selection draws nothing; leave --out away. It writes selection.json into each run.")
        return _selection(options.runs, options.json)
    with _needs("compare", "matplotlib", "yaml"):
        from fastlora.continual import compare as comparison
        from fastlora.continual.compare_page import write_comparison
        from fastlora.continual.saved_run import read_run
    groups = comparison.sort_groups(comparison.group_runs([read_run(path) for path in options.runs]), options.sort)
    written = write_comparison(groups, options.out) if options.out else None
    if options.json:
        print(json.dumps(comparison.comparison_json(groups), indent=2))
        return
    print(comparison.comparison_text(groups))
    if len(options.runs) <= 8:
        print("\nPlots: " + ", ".join(str(path / "plots") for path in options.runs))
    if written:
        print(f"Comparison: {written}")


def _selection(paths: Sequence[Path], as_json: bool) -> None:
    with _needs("compare", "open_clip", "yaml", "sklearn"):
        from fastlora.continual.selection import measure
    from fastlora.continual.saved_run import read_run

    found = []
    for path, run in [(path, read_run(path).run_config) for path in paths]:
        found.append(measure(run, say=functools.partial(print, file=sys.stderr)))
        written = found[-1].write(path)
        if not as_json:
            print(f"{found[-1]}\nwritten: {written}")
    if as_json:
        print(json.dumps([selection.as_dict() for selection in found], indent=2))


def merge(argv: Sequence[str]) -> None:
    """add adapter files to a file of weights: BASE.safetensors ADAPTER.safetensors ... --out FILE [--force]"""
    parser = _parser("merge", merge)
    parser.add_argument("base", type=Path, metavar="BASE", help="state_dict of an open_clip model, as safetensors")
    parser.add_argument(
        "adapters",
        type=Path,
        nargs="+",
        metavar="ADAPTER",
        help="such as RUN/adapters/task_*.safetensors; merged in the order given",
    )
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--force", action="store_true", help="replace OUT where it exists")
    options = parser.parse_args(argv)
    from fastlora.merge_files import merge_files

    reports = merge_files(options.base, options.adapters, options.out, force=options.force)
    for path, report in zip(options.adapters, reports):
        print(f"{path}\n{report}")
    print(f"written: {options.out}")


def tune(argv: Sequence[str]) -> None:
    """measure kernel variants and tiles for a CLIP and write your dispatch table: [--model NAME] [--rank R] [--out PATH] ..."""
    parser = _parser("tune", tune)
    parser.add_argument("--model", metavar="NAME", help="an open_clip architecture (default: the embedded tiny CLIP)")
    parser.add_argument("--rank", type=int, default=16, help="of every adapter (default: 16)")
    parser.add_argument("--batch", type=int, default=64, help="images, and as many texts (default: 64)")
    parser.add_argument("--texts", type=int, help="texts, where they are not as many as images")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="default: bfloat16"
    )
    parser.add_argument("--where", choices=("vision", "text", "all"), default="all", help="tower (default: all)")
    parser.add_argument("--out", type=Path, metavar="PATH", help="table to write (default: the one that is read)")
    parser.add_argument("--budget-seconds", type=float, default=60.0, help="stop after about this long (default: 60)")
    parser.add_argument("--device", default="cuda", help="default: cuda")
    options = parser.parse_args(argv)
    texts = options.batch if options.texts is None else options.texts
    if min(options.batch, texts) < 1:
        raise UsageError(f"--batch is {options.batch} with {texts} texts; both must be >= 1.")
    from fastlora.ops.dispatch import user_table_path
    from fastlora.tune import tuning

    device = tuning.check_device(options.device)  # before a large model takes its seconds
    with _needs("tune", "open_clip"):
        from fastlora.continual.shapes import clip_calls
    calls = clip_calls(options.model, options.rank, options.where, options.batch, texts, options.dtype)
    say = functools.partial(print, file=sys.stderr)
    print(tuning.tune(calls, device, out=options.out, budget_seconds=options.budget_seconds, progress=say))
    if options.out and options.out != user_table_path():
        print(f"It is read where FASTLORA_TABLE={options.out} is set.")


def doctor(argv: Sequence[str]) -> None:
    """say what is installed, how the extension was built, and which backends run; [--estimate MODEL] what a step takes"""
    parser = _parser("doctor", doctor)
    parser.add_argument(
        "--estimate", metavar="MODEL", help="memory and time of a training step of an architecture of open_clip"
    )
    counts = {"rank": 16, "images": 64, "classes": 100, "prompt-tokens": 16, "accumulate": 1}
    for name, default in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"of the estimate (default: {default})")
    parser.add_argument("--dtype", default="float32", help="of the estimate: float32, bfloat16 or float16")
    parser.add_argument("--activation-checkpointing", action="store_true", help="of the estimate")
    options = vars(parser.parse_args(argv))
    model = options.pop("estimate")
    if model is not None:
        with _needs("doctor --estimate", "open_clip"):
            from fastlora.continual import estimate
            from fastlora.continual.precision import DTYPES
        wanted = estimate.Wanted(model, **options)
        found = estimate.estimate(wanted)
        rate = estimate.rate_here(found.product, DTYPES[wanted.dtype])
        print(estimate.text(wanted, found, rate))
        return
    from fastlora.doctor import examine

    print("\n".join(f"{name:<16}{text}" for name, text in examine()))


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    name: (function, function.__doc__ or "")
    for name, function in (
        ("train", train),
        ("eval", evaluate),
        ("report", report),
        ("compare", compare),
        ("merge", merge),
        ("tune", tune),
        ("doctor", doctor),
    )
}


def _help() -> str:
    commands = "\n".join(f"  {name:<9}{summary}" for name, (_, summary) in COMMANDS.items())
    return f"usage: fastlora COMMAND ...\n\n{commands}\n\n`fastlora COMMAND --help` tells more."


def _parser(name: str, function: Callable[[Sequence[str]], None]) -> argparse.ArgumentParser:
    summary = (function.__doc__ or "").partition(":")[0]
    return argparse.ArgumentParser(prog=f"fastlora {name}", description=summary, allow_abbrev=False)


def _print_run(path: Path) -> None:
    from fastlora.continual.compare import run_text
    from fastlora.continual.saved_run import read_run

    print(run_text(read_run(path)))
    print(f"\nReport: {path / 'report.html'}\nPlots:  {path / 'plots'}")


def _fail(who: str, message: str, code: int, follows: bool = False) -> int:
    """follows: on a failure elsewhere, which is what to tell of, where several processes train together."""
    if _processes() == 1 or not _told_elsewhere(message, code, follows):
        print(f"{who}: {message}", file=sys.stderr)
    return code


def _told_elsewhere(message: str, code: int, follows: bool) -> bool:
    distributed = sys.modules.get("fastlora.continual.distributed")
    if code == 2 or distributed is None:  # all have the same command line, and the same Ctrl-C
        return os.environ["RANK"] != "0" and (code == 2 or follows)
    return distributed.told_elsewhere(message, follows)


def _processes() -> int:
    """How many torchrun started, this one among them."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


@contextlib.contextmanager
def _needs(command: str, *modules: str) -> Iterator[None]:
    """Imports of the [train] extra happen within; a missing one says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in modules:
            raise
        raise ImportError(
            f"`fastlora {command}` needs {error.name}, which is not installed. Run: pip install 'fastlora[train]'"
        ) from None


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does, in good order."""
    raised = {signal.SIGTERM: Terminated} | ({signal.SIGINT: KeyboardInterrupt} if _processes() > 1 else {})

    def leave(signum: int, frame: FrameType | None) -> None:
        if _processes() > 1:  # torchrun sends one after the other
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise raised[signal.Signals(signum)]

    try:
        before = {number: signal.signal(number, leave) for number in raised}
    except ValueError:  # not in the main thread, where no handler can be set
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
