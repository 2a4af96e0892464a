"""Journals that are damaged, exchanged, or laid over another model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from faults.case import Outcome, group
from faults.judge import refused, right, worst
from faults.stored import flipped, loading, rewritten, saved
from journal.cases import Net, learn, rewrite, write_tasks
from safetensors.torch import save_file
from torch import nn

import fastlora
from fastlora.adapter_file import read_adapter
from fastlora.merge_files import merge_files

files = group("files")


@files("an error that names the file, for every flip; the model has not changed", few=60, many=1000)
def flipped_bit_in_a_journal(folder: Path, count: int) -> Outcome:
    """One random bit of a task's file is another, and the model is rebuilt."""
    journal, _ = write_tasks(folder / "journal", count=1)
    model = Net()
    return flipped(folder / "journal" / "task_01.safetensors", count, lambda: journal.rebuild(model), model)


@files("an error that names the version that was found and those that are read")
def another_version(folder: Path) -> Outcome:
    """A file of a later format, one without a format, and a journal's of the older one."""
    path = saved(folder)
    outcomes = [loading(rewritten(path, format="fastlora.adapter/9"), "fastlora.adapter/9", "fastlora.adapter/2")]
    save_file(read_adapter(saved(folder)).tensors, path)
    outcomes.append(loading(path, "format None", "fastlora.adapter/2"))
    journal, _ = write_tasks(folder / "journal", count=1)
    rewritten(journal.directory / "task_01.safetensors")
    model = Net()
    told = ("task_01.safetensors", "fastlora.adapter/1", "fastlora merge")
    return worst([*outcomes, refused(lambda: journal.append(learn(model, 2)), *told, keeps=[folder])])


@files("an error that names file and entry; nothing has changed")
def header_of_a_journal_damaged(folder: Path) -> Outcome:
    """Task number, base or merge options of a journal's file are no such thing, and the checksum is right."""
    outcomes = []
    for place, (entry, value) in enumerate([("task", "one"), ("task", None), ("base", "[1]"), ("merge", "{")]):
        journal, _ = write_tasks(folder / str(place), count=1)
        path = journal.directory / "task_01.safetensors"
        header = {key: read_adapter(path).header[key] for key in ("task", "task_name", "base", "merge")} | {
            entry: value
        }
        fastlora.save_adapter(learn(Net(), 1), path, {key: text for key, text in header.items() if text is not None})
        model = Net()
        work = lambda j=journal, m=model: j.rebuild(m)  # noqa: E731
        outcomes.append(refused(work, path.name, "does not tell its task", keeps=[model, folder]))
    return worst(outcomes)


@files("an error that says it is another model of the same shapes; not one byte has changed")
def journal_of_another_base(folder: Path) -> Outcome:
    """A journal is rebuilt over, or merged into, weights of the same shapes that it was not trained on."""
    journal, _ = write_tasks(folder / "journal")
    model, path = Net(seed=1), folder / "base.safetensors"
    save_file(model.state_dict(), path)
    into_file = lambda: merge_files(path, sorted(journal.directory.iterdir()), folder / "out")  # noqa: E731
    told = ("another model of the same shapes",)
    return worst(refused(work, *told, keeps=[model, folder]) for work in (lambda: journal.rebuild(model), into_file))


@files("an error that says it has been merged already; not one byte has changed")
def journal_over_a_merged_model(folder: Path) -> Outcome:
    """A journal is rebuilt over a model that holds its tasks already: each would be in twice."""
    journal, _ = write_tasks(folder / "journal")
    model = Net()
    journal.rebuild(model, after=2)
    return refused(lambda: journal.rebuild(model), "merged already", "untouched weights", keeps=[model])


@files("an error that names the file; no weight has changed, and nothing is appended")
def journal_with_a_wrong_file(folder: Path) -> Outcome:
    """A file is missing, is another task's, is of another journal, or holds other modules."""
    outcomes = []
    for name, (damage, *told) in _wrong_files().items():
        journal, _ = write_tasks(folder / name, count=3)
        damage(journal.directory / "task_02.safetensors")
        model = Net()
        outcomes.append(refused(lambda j=journal, m=model: j.rebuild(m), *told, keeps=[model, journal.directory]))
    return worst(outcomes)


def _wrong_files() -> dict[str, tuple[Any, ...]]:
    def of_other_modules(path: Path) -> None:
        model = nn.Sequential(nn.Linear(8, 8))
        fastlora.inject(model, rank=2, where=["0"])
        rewrite(path, model)

    def of_another_base(path: Path) -> None:
        other, _ = write_tasks(path.parent.parent / "foreign", seed=5)
        shutil.copy(other.directory / path.name, path)

    return {
        "missing": (Path.unlink, "task_02.safetensors is missing"),
        "exchanged": (lambda p: shutil.copy(p.with_name("task_03.safetensors"), p), "holds task 3, not 2"),
        "base": (of_another_base, "task_02.safetensors belongs to another base model"),
        "modules": (of_other_modules, "no weight for the adapter of 0"),
    }


@files("a file in its own directory, and the name kept as text")
def name_with_a_path_in_it(folder: Path) -> Outcome:
    """Tasks are called ../../outside and /outside, have a line break, are 5,000 letters long."""
    inside = folder / "a" / "b"
    inside.mkdir(parents=True)
    before = set(folder.rglob("*"))
    for name in ("../../outside", "/outside", "a\nb", "x" * 5000):
        journal = fastlora.Journal(inside)
        journal.append(learn(Net(), len(journal) + 1), name)
    names = [entry.name for entry in fastlora.Journal(inside)]
    new = set(folder.rglob("*")) - before
    return right(all(path.parent == inside for path in new) and names[0] == "../../outside", f"{sorted(new)}")
