"""The journal of a model's tasks: their pruned adapters on disk, from which the state after any task is built again."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.adapt import adapters, prune
from fastlora.adapter_file import adapter_tensors, read_adapter, save_adapter, some
from fastlora.base_weights import base_weights, merge_adapter
from fastlora.files import alone_in
from fastlora.fingerprint import fingerprint
from fastlora.interrupts import uninterrupted
from fastlora.journal_entry import (
    JournalEntry,
    changed_weights,
    check_kinds,
    check_one_base,
    check_untouched,
    header_of,
    hosts,
    journal_entry,
    updated,
)
from fastlora.ops.merge import MergeReport
from fastlora.tied import check_no_ties, check_untied

_FILE = re.compile(r"task_(\d{2,})\.safetensors")
_MERGE_OPTIONS = ("rounding", "seed")  # those that decide the bits of a merge and fit into a header


class Journal:
    """The pruned adapters of every task, one file each, and the fingerprint of the base model that they belong to.

        journal = Journal("adapters")
        journal.append(model, "aircraft")       # the adapters of the model, before fastlora.merge(model)
        journal.rebuild(base, after=3)          # the untouched base model becomes the one after task 3, bit for bit
        journal.rebuild(base, tasks=[1, 3])     # the one that never had task 2's update

    len() is the number of tasks; iterating reads and checks each file and gives a JournalEntry.

    A file names its task, the base model (dtype, shape and SHA-256 of every parameter before task 1; buffers are not
    covered) and its own SHA-256. It is written in one step: a kill leaves the journal with the task or without it. One
    process writes a journal at a time; a second one that appends meanwhile is refused.

    Args:
        directory: holds task_01.safetensors, task_02.safetensors, ...; the first `append` makes it.
    Raises:
        NotADirectoryError: `directory` is something else.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        if self.directory.exists() and not self.directory.is_dir():
            raise NotADirectoryError(f"{directory} is a file; a journal is a directory. Give its directory.")

    def __len__(self) -> int:
        return len(self._files())

    def __iter__(self) -> Iterator[JournalEntry]:
        return map(self._entry, self._files())

    def append(self, model: nn.Module, name: str = "", **merge_options: Any) -> Path:
        """Prune the adapters of `model` and write them as the next task. Call it before the merge, which resets them.

        Reads the earlier files, and hashes what they do not update, since it must be as it was before task 1. Should
        the merge that follows fail, remove the file that is returned.

        Whatever is raised, the journal has not changed, and the model has at most been pruned.

        Args:
            model: with adapters that are trained and not merged yet.
            name: of the task, for the listing.
            merge_options: rounding and seed of the merge that follows, where they are not the defaults.
        Returns:
            The file.
        Raises:
            ValueError: no adapters; a value that is not finite; another model than that of the earlier tasks; the
                adapters of the last task again; an adapted weight that is tied to another; an earlier file that is
                damaged.
            TypeError: a merge option that a header cannot hold.
            RuntimeError: another process appends at this moment.
            OSError: the directory cannot be written, or an earlier file is missing.
        """
        _check_options(merge_options)
        _check_finite(model)
        check_untied(model, dict(adapters(model)))
        with alone_in(self.directory):
            entries = self._entries(self._numbers())
            base = self._base_of(model, entries)
            prune(model)
            _check_new(model, entries)
            self._sweep()
            path = self._path(len(entries) + 1)
            save_adapter(model, path, header_of(len(entries) + 1, name, base, merge_options))
        return path

    def rebuild(
        self,
        model: nn.Module,
        after: int | None = None,
        *,
        tasks: Sequence[int] | None = None,
        residuals: dict[str, Tensor] | None = None,
    ) -> list[MergeReport]:
        """Bring the untouched base model to the state after a task, or after some tasks alone.

        The adapters are merged in the order of the tasks, each as it was merged at the time, so that `after` gives the
        very bits of back then, and `tasks` those of a sequence that never had the others. Whatever is raised, the model
        has not changed.

        Args:
            model: the base model without adapters; its parameters are written in place.
            after: number of the last task, 0 for the base model; by default the last one of the journal.
            tasks: in place of `after`, the numbers of the tasks to keep, ascending.
            residuals: for tasks that were merged with residuals, those of the base model: {} for zeros in the weights'
                dtype, or zeros of int8 by adapter. They are left as `fastlora.merge` left its own.
        Returns:
            A report for each task.
        Raises:
            ValueError: no such task; a file is damaged or not of this journal; the model has adapters, is not the base
                model, has been merged already, or ties a weight that would be merged into to another.
            MergeError: a sum overflows.
            OSError: a file is missing or cannot be read.
        Memory:
            The adapters of one task at a time, and a second copy of the weights that they update.
        """
        entries = self._entries(self._chosen(after, tasks))
        what, weights = type(model).__name__, base_weights(model)
        _check_plain(model)
        if known := entries or self._entries(self._numbers()[:1]):
            check_kinds(what, weights, known[0].base)
            check_untouched(what, weights, known)
        targets = hosts(what, weights, entries)
        check_no_ties({name: weights[name] for name in targets}, weights)
        # merged beside the model, so that a fault in the last file finds the first weight as it was
        copies = {name: weights[name].clone() for name in targets}
        kept = None if residuals is None else {name: residual.clone() for name, residual in residuals.items()}
        reports = [merge_adapter(read_adapter(entry.path), weights | copies, what, kept) for entry in entries]
        with torch.no_grad(), uninterrupted():
            for name, merged in copies.items():
                weights[name].copy_(merged)
        if residuals is not None and kept is not None:
            residuals |= kept
        return reports

    def _path(self, number: int) -> Path:
        return self.directory / f"task_{number:02d}.safetensors"

    def _files(self) -> list[int]:
        """Numbers of the tasks that have a file."""
        names = [path.name for path in self.directory.iterdir()] if self.directory.exists() else []
        return sorted(int(match[1]) for name in names if (match := _FILE.fullmatch(name)))

    def _numbers(self) -> list[int]:
        """1 to the last task, whether the file is there or not."""
        return list(range(1, max(self._files(), default=0) + 1))

    def _chosen(self, after: int | None, tasks: Sequence[int] | None) -> list[int]:
        every = self._numbers()
        if after is not None and tasks is not None:
            raise ValueError(f"after={after} and tasks={list(tasks)} were given; give one of them.")
        if tasks is not None and list(tasks) != sorted(set(tasks) & set(every)):
            raise ValueError(
                f"tasks is {list(tasks)}; {self.directory} holds {len(every)} tasks. Give numbers from 1 to "
                f"{len(every)}, ascending, each once: they are merged in the order in which they were learned."
            )
        if after is not None and not 0 <= after <= len(every):
            raise ValueError(
                f"task {after} was asked for; {self.directory} holds {len(every)} tasks. Give 0 to {len(every)}."
            )
        return every[:after] if tasks is None else list(tasks)

    def _entries(self, numbers: Sequence[int]) -> list[JournalEntry]:
        """The entries of these tasks: all there, whole, and of one base model."""
        entries = [self._entry(number) for number in numbers]
        check_one_base(entries)
        return entries

    def _entry(self, number: int) -> JournalEntry:
        path = self._path(number)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing; what has task {number} in it cannot be built without. Put the file back, or leave "
                "the task out with rebuild(model, tasks=[...])."
            )
        entry = journal_entry(read_adapter(path))
        if entry.number != number:
            raise ValueError(f"{path} holds task {entry.number}, not {number}. Put back the file of task {number}.")
        return entry

    def _sweep(self) -> None:
        """Remove the hidden files of writers that were killed."""
        for path in self.directory.glob(".task_*.safetensors.*"):
            path.unlink()

    def _base_of(self, model: nn.Module, entries: Sequence[JournalEntry]) -> dict[str, str]:
        """Fingerprint of the base weights: taken before the first merge, then known, and compared where none merged."""
        what, weights = type(model).__name__, base_weights(model)
        if not entries:
            return fingerprint(weights)
        base = entries[0].base
        check_kinds(what, weights, base)
        merged = updated(what, weights, entries)
        changed = changed_weights({name: weight for name, weight in weights.items() if name not in merged}, base)
        if changed:
            raise ValueError(
                f"{some(changed)} of {what} changed since task 1, and no task of {self.directory} updates that: it is "
                "another model than the journal's, or was trained beside its adapters. Give it a journal of its own, "
                "and train adapters alone."
            )
        return base


def _check_options(merge_options: dict[str, Any]) -> None:
    unknown = sorted(set(merge_options) - set(_MERGE_OPTIONS))
    if unknown:
        raise TypeError(
            f"merge options {unknown} were given; a journal keeps {' and '.join(_MERGE_OPTIONS)}. Leave the others out."
        )
    if merge_options.get("rounding") == "stochastic" and merge_options.get("seed") is None:
        raise ValueError(
            "rounding is 'stochastic' without a seed, which no rebuild could repeat. Pass seed=... to both."
        )


def _check_finite(model: nn.Module) -> None:
    for key, tensor in adapter_tensors(model).items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{key} holds non-finite values; it was not written. Restore or reset the adapter.")


def _check_new(model: nn.Module, entries: Sequence[JournalEntry]) -> None:
    """A task that is written twice would be merged twice. Adapters of rank 0 may well be equal."""
    tensors: dict[str, Tensor] = adapter_tensors(model)
    if entries and any(entries[-1].ranks.values()) and entries[-1].hashes == fingerprint(tensors):
        raise ValueError(
            f"the adapters are those of {entries[-1].path}, bit for bit; a task is written once. Merge them, and train "
            "fresh ones for the next task."
        )


def _check_plain(model: nn.Module) -> None:
    found = sum(1 for _ in adapters(model))
    if found:
        raise ValueError(
            f"{type(model).__name__} has {found} adapters; rebuild takes the plain base model. "
            "Call fastlora.remove(model)."
        )
