"""No room, no permission, nothing there, and others who write at the same time."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from faults.case import Outcome, group, in_children
from faults.judge import refused, right, short, their_refusal, worst
from faults.models import ours, theirs
from faults.stored import loading, saved
from journal.cases import Net, learn, write_tasks
from safetensors.torch import save_file
from torch import nn

import fastlora
from fastlora.adapter_file import read_adapter
from fastlora.merge_files import merge_files

files = group("files")


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As a full disk is met: a write finds no room in its middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _wide(rank: int | None = None) -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 64))
    if rank is not None:
        fastlora.inject(model, rank, where=["0"])
    return model


def _in_no_room(work: Callable[[], Any], folder: Path, *told: str, judge: Any = refused) -> Outcome:
    def limited() -> None:
        with files_of_at_most(16_000):
            work()

    return judge(limited, *told, keeps=[folder])


@files("an error that names the file; what was there before is whole, and nothing half-written stays")
def disk_full(folder: Path) -> Outcome:
    """There is room for half a file: an adapter file over an old one, a journal's task, merged weights."""
    saved(folder)
    large = _wide(64)
    plain, adapter = folder / "base.safetensors", folder / "small.safetensors"
    save_file({"0.weight": torch.zeros(64, 64), "0.bias": torch.zeros(64)}, plain)
    fastlora.save_adapter(_wide(2), adapter)
    journal = fastlora.Journal(folder)
    writes = {
        "adapter.safetensors": lambda: fastlora.save_adapter(large, folder / "adapter.safetensors"),
        "task_01.safetensors": lambda: journal.append(large),
        "out.safetensors": lambda: merge_files(plain, [adapter], folder / "out.safetensors"),
    }
    return worst(_in_no_room(work, folder, name, "was not written", "room") for name, work in writes.items())


@disk_full.peft
def _(folder: Path) -> Outcome:
    theirs(_wide(), where=["0"]).save_pretrained(folder)
    model = theirs(_wide(), where=["0"], r=64)
    return _in_no_room(lambda: model.save_pretrained(folder), folder, "large", judge=their_refusal)


def _as_nobody(work: Callable[[], Outcome]) -> Outcome:
    os.seteuid(65534)
    try:
        return work()
    finally:
        os.seteuid(0)


@files("an error that names the file and says what to look at; nothing stays behind")
def directory_that_cannot_be_written(folder: Path) -> Outcome:
    """Read-only for this user, missing, or a directory where the file should go; file and journal."""
    os.chmod(folder, 0o555)
    (folder / "taken").mkdir()
    writes = [
        (folder / "a.safetensors", "a.safetensors was not written"),
        (folder / "missing" / "a.safetensors", "missing"),
        (folder / "taken", "taken was not written"),
    ]

    def work() -> Outcome:
        outcomes = [refused(lambda p=p: fastlora.save_adapter(ours(), p), told, keeps=[folder]) for p, told in writes]
        outcomes.append(refused(lambda: fastlora.Journal(folder).append(ours()), "was not written", keeps=[folder]))
        return worst(outcomes)

    return _as_nobody(work) if os.geteuid() == 0 else work()


@directory_that_cannot_be_written.peft
def _(folder: Path) -> Outcome:
    os.chmod(folder, 0o555)
    work = lambda: their_refusal(lambda: theirs().save_pretrained(folder), "denied", keeps=[folder])  # noqa: E731
    return _as_nobody(work) if os.geteuid() == 0 else work()


@files("an error that names what was asked for")
def file_that_is_none(folder: Path) -> Outcome:
    """A file that is not there, a directory, a journal in a file."""
    (folder / "file").write_text("mine")
    return worst(
        [
            loading(folder / "none.safetensors"),
            loading(_directory(folder / "directory.safetensors")),
            refused(lambda: fastlora.Journal(folder / "file"), "file is a file", keeps=[folder]),
        ]
    )


def _directory(path: Path) -> Path:
    path.mkdir()
    return path


@files("a whole file of one of the two, whenever it is read", few=20, many=200)
def two_processes_write_one_file(folder: Path, count: int) -> Outcome:
    """Both save an adapter file of the same name, again and again, while a third reads it."""
    path = saved(folder)

    def write(size: float) -> None:
        model = ours(size=size)
        for _ in range(count):
            fastlora.save_adapter(model, path)

    def read() -> int:
        return sum(len(read_adapter(path).tensors) == 6 for _ in range(count))

    found = in_children([lambda: write(1.0), lambda: write(2.0), read], 300)
    whole = found[2][1]
    return right(whole == count and [p.name for p in folder.iterdir()] == [path.name], str(found)[-300:], reads=count)


@files("every task that was written is there, or an error says that another process writes", few=10, many=100)
def two_processes_write_one_journal(folder: Path, count: int) -> Outcome:
    """Both append tasks to one journal at the same time."""

    def write(seed: int) -> int:
        model, journal, written = learn(Net(), 1), fastlora.Journal(folder / "journal"), 0
        torch.manual_seed(seed)
        for task in range(count):
            for parameter in fastlora.adapter_parameters(model):
                parameter.data.normal_()
            try:
                journal.append(model, f"{seed} {task}")
                written += 1
            except RuntimeError as error:
                assert "another process" in str(error), error
        return written

    found = in_children([lambda: write(1), lambda: write(2)], 300)
    broken = next((result for died, result in found if died or not isinstance(result, int)), None)
    if broken is not None:
        return Outcome("unclear error", short(broken[-200:]))
    written, there = sum(result for _, result in found), len(list(fastlora.Journal(folder / "journal")))
    return right(written == there, f"{written - there} of {written} tasks are lost", written=written, there=there)


@files("an error that names what was given; what was there before is whole")
def output_that_exists_or_input_that_is_damaged(folder: Path) -> Outcome:
    """`fastlora merge` onto a file that is there, from truncated weights, into a directory that is not there."""
    journal, _ = write_tasks(folder / "journal", count=1)
    adapter, base = journal.directory / "task_01.safetensors", folder / "base.safetensors"
    save_file(Net().state_dict(), base)
    (folder / "out.safetensors").write_bytes(b"mine")
    (folder / "half.safetensors").write_bytes(base.read_bytes()[:-9])
    calls = [
        (lambda: merge_files(base, [adapter], folder / "out.safetensors"), "out.safetensors exists"),
        (lambda: merge_files(folder / "half.safetensors", [adapter], folder / "new"), "half.safetensors"),
        (lambda: merge_files(base, [adapter], folder / "missing" / "new"), "missing is no directory"),
        (lambda: merge_files(base, [adapter, adapter], folder / "new"), "each once"),
    ]
    return worst(refused(work, told, keeps=[folder]) for work, told in calls)
