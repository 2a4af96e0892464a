"""Two processes that train one model: one of them dies, fails, or computes something else."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from distributed import runs
from faults.case import Outcome, group, in_children
from faults.judge import harm, right

from fastlora.continual import read_run

processes = group("process")
Told = tuple[str, Any]


def _together(work: Callable[..., Any], *arguments: Any, size: int = 2) -> list[Told]:
    """How each process ended: ("", what work(rank, *arguments) returned, or a traceback), or how it died."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun has one
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(size)}
    place |= {"TORCHELASTIC_RUN_ID": "fault", "TORCHELASTIC_USE_AGENT_STORE": "True"}

    def one(rank: int) -> Any:
        os.environ |= place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        return work(rank, *arguments)

    return in_children([lambda rank=rank: one(rank) for rank in range(size)], 100)


def _goes_on(folder: Path) -> bool:
    """Whether one process ends what two began as if nobody had stopped them."""
    found, expected = runs.resume(0, folder), runs.train(0)
    return found["record"] == expected["record"] and runs.relative(found["weights"], expected["weights"]) < 1e-5


@processes("the same bits of gates, ranks, weights and accuracies in both, and but for rounding those of one process")
def two_processes_and_three_tasks() -> Outcome:
    """CoDyRA over three tasks in two processes: whose ranks are dead is decided in each."""
    (died, one), (ended, two) = _together(runs.train, runs.CODYRA, None, {"tasks": 3})
    if died or ended or isinstance(one, str) or isinstance(two, str):
        return harm(died or ended or str(one)[-200:])
    alone = runs.train(0, runs.CODYRA, None, {"tasks": 3})
    try:
        runs.assert_same_bits([one, two])
        runs.assert_same_run(one, alone)
    except AssertionError as error:
        return harm(f"the processes differ, and nothing told: {error}")
    dead = sum(int((value == 0).sum()) for task in one["adapters"] for key, value in task.items() if "gate" in key)
    return right(dead, "no rank died, so nothing was decided", processes=2, tasks=3, dead=dead)


@processes("both stop with an error that tells of it, before the task is merged")
def gates_that_differ_between_processes(folder: Path) -> Outcome:
    """A gate of one of two processes becomes another while they train."""
    (_, own), (_, other) = _together(_train_with_another_gate, folder / "run")
    told = "the trained parameters of process 1 of 2"
    if not all(isinstance(each, str) and told in each for each in (own, other)):
        return harm(f"{own}; {other}")
    return right(read_run(folder / "run").record.finished_tasks == 0, "the task counts as finished", own)


def _train_with_another_gate(rank: int, out: Path) -> Any:
    trainer = runs.make_trainer(out=out)
    runs.stop_in_task(1, lambda: _change_a_gate(trainer.model), (1,), trainer)
    try:
        trainer.fit()
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return None


def _change_a_gate(model: torch.nn.Module) -> None:
    next(p for name, p in model.named_parameters() if name.endswith("gate")).data[0] += 0.5


def _stopped(out: Path, how: Callable[[], None], rank: int) -> tuple[Told, Told]:
    found = _together(runs.train_and_stop, out, how, (rank,))
    return found[rank], found[1 - rank]


@processes("the other stops and says so; --resume goes on to the results of a run that was left alone", few=2, many=2)
def one_of_two_processes_is_killed(folder: Path, count: int) -> Outcome:
    """kill -9 in the second task, of the process that writes the directory, or of the other."""
    for rank in range(count):
        out = folder / f"run_{rank}"
        (died, _), (_, told) = _stopped(out, runs.die, rank)
        if (died, str(told)[:11]) != ("killed by SIGKILL", "LostProcess"):
            return harm(f"{died}; the other: {told}")
        if read_run(out).record.finished_tasks != 1 or not _goes_on(out):
            return harm("other results than those of a run that nobody stopped")
    return right(True, "", "the other: a process that takes part in this run cannot be reached any more", kills=count)


@processes("both stop, the manifest names the error; --resume goes on to the results of a run that was left alone")
def one_of_two_processes_fails(folder: Path) -> Outcome:
    """An image that only the first of two processes reads is broken."""
    (_, own), (_, other) = _stopped(folder / "run", runs.fail, 0)
    if own != "ValueError: a broken image" or not str(other).startswith("LostProcess"):
        return harm(f"{own}; the other: {other}")
    run = read_run(folder / "run")
    return right(
        run.status == "failed" and _goes_on(folder / "run"), f"status {run.status}, or other results", str(other)
    )
