"""Signals, memory that runs out, and losses of others: what stops a process in an orderly way, or should."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from faults.case import Outcome, group, in_child
from faults.judge import content, refused, right, short, worst
from faults.models import ours, theirs
from faults.runs import finished, resumed, trainer
from safetensors.torch import load_file
from torch import nn

import fastlora

processes = group("process")


# ---- signals


def _command(folder: Path, number: int) -> tuple[int, Path]:
    """`fastlora train` in this process, with the signal in its second task; its exit code and directory."""
    from cli.tiny import QUICK, tiny

    from fastlora import cli
    from fastlora.continual import benchmarks, report
    from fastlora.continual.methods import CoDyRA

    os.chdir(folder)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job ignores it, and so do its children
    benchmarks.BENCHMARKS["tiny"] = benchmarks.Benchmark(tiny, presets={"codyra": {"kappa_max": 0.4}})
    report.write_report = lambda path: None
    CoDyRA.after_step = lambda self, ctx: os.kill(os.getpid(), number) if number and ctx.number == 2 else None
    return cli.main(["train", *QUICK, "--out=run", "--resume"]), folder / "run"


def _tables(out: Path) -> dict[str, bytes]:
    names = ("accuracy.csv", "accuracy_union.csv", "ranks.csv", "log.csv", "metrics.json")
    tables = {name: (out / name).read_bytes() for name in names}
    return tables | {
        name: content(tensor) for name, tensor in load_file(out / "checkpoints/task_02.safetensors").items()
    }


@processes("exit code 130 or 143, a directory that can be read, and by --resume the bits of a whole run")
def interrupted_and_terminated(folder: Path) -> Outcome:
    """Ctrl-C and SIGTERM in the second task of `fastlora train`."""
    from fastlora.continual import read_run

    (folder / "whole").mkdir()
    code, out = _command(folder / "whole", 0)  # here, so that the others need not import everything again
    expected, bad = _tables(out), [] if code == 0 else [f"exit code {code} of a whole run"]
    for number, wanted in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        place = folder / str(number)
        place.mkdir()
        code, out = _in_its_own(lambda place=place, number=number: _command(place, number))
        run = read_run(out)
        if (code, run.status, run.record.finished_tasks) != (wanted, "interrupted", 1):
            bad.append(f"code {code}, {run.status}, {run.record.finished_tasks} tasks")
        _in_its_own(lambda place=place: _command(place, 0))
        bad += [] if _tables(out) == expected else [f"other results after signal {number}"]
    return right(not bad, "; ".join(bad), signals=2)


def _in_its_own(work: Callable[[], Any]) -> Any:
    died, result = in_child(work, 120)
    if died or isinstance(result, str):
        raise RuntimeError(died or result)
    return result


def _effect(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(7)
    return model(torch.randn(16, 8)).detach()


def _interrupted(merge: Callable[[nn.Module], Any], make: Callable[[], nn.Module], count: int) -> Outcome:
    """Ctrl-C at random moments of a merge; what the model computes must not change, whether it came to its end or not."""
    model = make()
    started = time.perf_counter()
    merge(model)
    typical, choose, inside, bad = time.perf_counter() - started, random.Random(0), 0, 0
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for _ in range(count):
        model = make()
        before = _effect(model)
        timer = threading.Timer(choose.uniform(0.0, 1.2 * typical), lambda: os.kill(os.getpid(), signal.SIGINT))
        try:
            timer.start()
            merge(model)
            timer.join()
            time.sleep(0.001)
        except KeyboardInterrupt:
            inside += 1
        timer.join()
        bad += not torch.allclose(_effect(model), before, rtol=1e-3, atol=1e-4)
    return right(not bad, f"{bad} of {inside} interrupts changed what the model computes", interrupts=inside)


def _many_layers() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(40)))


@processes("each update in its weight or in its adapter, never in both", few=25, many=300)
def interrupted_merge(count: int) -> Outcome:
    """Ctrl-C at random moments of a merge of 40 layers."""
    return _interrupted(fastlora.merge, lambda: ours(_many_layers(), where=["*"], size=0.1), count)


@interrupted_merge.peft
def _(count: int) -> Outcome:
    names = [str(i) for i in range(40)]
    return _interrupted(lambda m: m.merge_adapter(), lambda: theirs(_many_layers(), where=names, size=0.1), count)


# ---- memory
ROOMS = [1 << i for i in range(14, 27)]  # 16 KiB to 64 MiB


def _limited(work: Callable[[], Any], room: int) -> str:
    """The error of `work` with so many bytes of address space beyond what the process has; "" where it was enough."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken, limits[1]))
    held = _all_that_is_free()
    resource.setrlimit(resource.RLIMIT_AS, (taken + room, limits[1]))
    try:
        work()
    except (MemoryError, RuntimeError) as error:
        return f"{type(error).__name__}: {short(error)}"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        held.clear()
    return ""


def _all_that_is_free() -> list[torch.Tensor]:
    """What the process has of memory that earlier work gave back, which would serve whatever the limit."""
    held, size = [], ROOMS[-1]
    while size >= ROOMS[0]:
        try:
            held.append(torch.empty(size, dtype=torch.uint8))
        except (MemoryError, RuntimeError):
            size //= 2
    return held


def _starved(make: Callable[[], nn.Module], work: Callable[[nn.Module], Any], told: str = "memory") -> Outcome:
    """`work` with ever more memory, each time in a process of its own: what the model computes stays as it was."""
    failed = 0
    for room in ROOMS:

        def attempt(room: int = room) -> tuple[str, bool]:
            model = make()
            before = _function(model)
            error = _limited(lambda: work(model), room)
            return error, torch.allclose(_function(model), before, rtol=1e-3, atol=1e-3)

        died, result = in_child(attempt, 60)
        if died:
            return Outcome("crash", f"{died} with {room >> 10} KiB")
        if isinstance(result, str):
            raise RuntimeError(result)
        error, kept = result
        failed += bool(error)
        if not kept:
            return Outcome("half done", f"{error} with {room >> 10} KiB, and the model computes something else")
        if error and told not in error.lower():
            return Outcome("unclear error", error)
    return right(failed and failed < len(ROOMS), "memory never ran out, or always", "an error, nothing changed",
                 limits=len(ROOMS), failed=failed)  # fmt: skip


def _function(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(7)
    return model(torch.randn(3, 512)).detach()


def _two_wide(plain: bool = False) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))
    return model if plain else ours(model, where=["0", "1"], size=0.02)


@processes("an error that says so; what the model computes has not changed")
def memory_runs_out_in_a_merge() -> Outcome:
    """A merge of two layers with 16 KiB to 64 MiB of memory left."""
    return _starved(_two_wide, fastlora.merge)


@memory_runs_out_in_a_merge.peft
def _() -> Outcome:
    def make() -> Any:
        return theirs(_two_wide(plain=True), where=["0", "1"], size=0.02)

    return _starved(make, lambda model: model.merge_adapter())


@processes("an error that says so; the model is the plain one")
def memory_runs_out_in_inject() -> Outcome:
    """Adapters of a rank of 4,096 for two layers with 16 KiB to 64 MiB of memory left."""
    return _starved(lambda: _two_wide(plain=True), lambda model: fastlora.inject(model, 4096, where=["0", "1"]))


@processes("an error that says what took it; the run goes on from its last task to the same bits")
def memory_runs_out_in_a_step(folder: Path) -> Outcome:
    """There is no memory for a step of the second task, on a CPU (a real failure to allocate) and as a GPU tells it."""
    expected, outcomes = finished(folder / "whole"), []

    def of_a_cpu(*given: Any) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    def of_a_gpu(*given: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    for fails in (of_a_cpu, of_a_gpu):
        out = folder / fails.__name__
        run = trainer(out)
        step = run._step
        run._step = lambda call, iteration, batch, ctx, step=step, fails=fails: step(
            fails if ctx.number == 2 else call, iteration, batch, ctx
        )
        outcomes.append(refused(run.fit, "memory of cpu ran out", "MiB", "--accumulate"))
        outcomes.append(resumed(out, expected))
    return worst(outcomes)


# ---- others


def _child_of(code: str) -> list[str]:
    return [sys.executable, "-c", f"import os, signal, sys, time\n{code}"]


@processes("the others come to their end; its exit code tells")
def one_process_of_several_seeds_dies() -> Outcome:
    """One of three training processes is killed."""
    from fastlora.continual import seeds

    dies, lives = _child_of("os.kill(os.getpid(), signal.SIGKILL)"), _child_of("time.sleep(0.1); print('lora done')")
    codes = seeds.run_all({0: lives, 1: dies, 2: lives}, 3, "lora")
    return right(codes == {0: 0, 1: -9, 2: 0}, f"exit codes {codes}")


@processes("an error that names the image; the run goes on to the same bits once it is back")
def thread_that_decodes_images_fails(folder: Path) -> Outcome:
    """An image is damaged while the run is at work."""
    from faults.pictures import picture_stream

    def stream() -> Any:
        return picture_stream(folder / "data")

    expected = finished(folder / "whole", stream=stream())
    run = trainer(folder / "run", stream=stream())
    image = sorted((folder / "data").rglob("*.png"))[0]
    whole, begin_task = image.read_bytes(), run.method.begin_task

    def damaged(ctx: Any) -> None:
        begin_task(ctx)
        image.write_bytes(whole[: len(whole) // 2])

    run.method.begin_task = damaged
    found = refused(run.fit, image.name, "cannot be decoded", "verify")
    image.write_bytes(whole)
    return worst([found, resumed(folder / "run", expected, stream=stream())])


@processes("a loss that is not finite stops the run, with the step; it goes on from its last task to the same bits")
def loss_that_is_not_finite(folder: Path) -> Outcome:
    """NaN in the second task: nothing of it may be merged."""
    expected = finished(folder / "whole")
    run = trainer(folder / "run")
    run.method.extra_loss = lambda ctx: torch.tensor(float("nan")) if ctx.number == 2 else None
    found = refused(run.fit, "loss is nan", "iteration 0", "task 2")
    return worst([found, resumed(folder / "run", expected)])


@processes("an error that says that it is in use; the first one's results are those of a run alone")
def second_process_in_one_run_directory(folder: Path) -> Outcome:
    """A second process resumes a run that is at work."""
    expected, found = finished(folder / "whole"), []
    run = trainer(folder / "run")
    begin_task = run.method.begin_task

    def second(ctx: Any) -> None:
        if ctx.number == 2:
            found.append(_in_its_own(lambda: _second(folder / "run")))
        begin_task(ctx)

    run.method.begin_task = second
    run.fit()
    return worst([*found, resumed(folder / "run", expected)])


def _second(out: Path) -> Outcome:
    return refused(trainer(out, resume=True).fit, "in use", "another process", keeps=[out])
