"""Merging adapter files into a file of weights, without building a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastlora.adapter_file import read_adapter
from fastlora.base_weights import merge_adapter
from fastlora.files import write_atomically
from fastlora.journal_entry import JournalEntry, check_kinds, check_one_base, check_untouched, in_journal, journal_entry
from fastlora.ops.merge import MergeReport


def merge_files(
    base: str | os.PathLike[str],
    adapters: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    force: bool = False,
) -> list[MergeReport]:
    """Write the weights of `base` with the updates of `adapters` added one after the other, in their own dtypes.

    Files of a journal must be of one journal and in the order of its tasks. When they begin with task 1, `base` must be
    the untouched base model; when with a later one, a model of its shapes, such as the one after the task before.

    Args:
        base: safetensors file with the state_dict of an open_clip model (or any model that the adapters' names fit).
        adapters: files of a journal, such as adapters/task_01.safetensors of a run, or from `fastlora.save_adapter`.
        out: file to write, in one step.
        force: replace `out` where it exists.
    Returns:
        A report for each adapter file.
    Raises:
        FileExistsError: `out` exists and force is False.
        ValueError: a file cannot be read, or an adapter does not fit the weights; the module is named.
        MergeError: a sum overflows. Whatever is raised, `out` has not changed.
    """
    out = Path(out)
    if out.exists() and not force:
        raise FileExistsError(f"{out} exists; it is not overwritten without --force. Give another --out, or --force.")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"{out.absolute().parent} is no directory, so {out.name} cannot be written there. Make it first."
        )
    state, metadata = _read_state(Path(base))
    # read twice: what is checked here is not kept, so that one task's adapters are in memory at a time
    _check_journal(base, state, [journal_entry(file) for file in map(read_adapter, adapters) if in_journal(file)])
    reports = [merge_adapter(read_adapter(path), state, str(base)) for path in adapters]
    write_atomically(out, save(state, metadata))
    return reports


def _read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    before = _identity(path)
    try:
        with safe_open(path, framework="pt") as file:  # which maps a large file, and opens it by name twice
            found = {key: file.get_tensor(key) for key in file.keys()}, {"format": "pt", **(file.metadata() or {})}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}). Give a state_dict saved as one."
        ) from None
    if _identity(path) != before:
        raise ValueError(f"{path} was replaced while it was read. Start again when nobody writes it.")
    return found


def _identity(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _check_journal(path: str | os.PathLike[str], state: dict[str, Tensor], entries: Sequence[JournalEntry]) -> None:
    if not entries:
        return
    check_one_base(entries)
    for earlier, later in zip(entries, entries[1:]):
        if earlier.number >= later.number:
            raise ValueError(
                f"{later.path} (task {later.number}) comes after {earlier.path} (task {earlier.number}); the files of "
                "a journal are merged in the order of its tasks, each once. Give them in that order."
            )
    # a state_dict has buffers besides, and may lack a tied weight
    base = {name: entries[0].base[name] for name in entries[0].base if name in state}
    weights = {name: state[name] for name in base}
    check_kinds(str(path), weights, base)
    if entries[0].number == 1:
        check_untouched(str(path), weights, entries)
