"""One task of a journal as its file tells it, and whether weights are those of the base model that the file names."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastlora.adapter_file import FORMAT, AdapterFile, some
from fastlora.base_weights import host_of
from fastlora.fingerprint import fingerprint, kind


@dataclass(frozen=True)
class JournalEntry:
    """One task of a journal.

    Attributes:
        number: of the task, 1 for the first.
        name: of the task, or "".
        path: its file.
        ranks: kept rank of each module.
        merge_options: what was given to `Journal.append`; a rebuild merges with the same.
        base: fingerprint of the weights before task 1.
        hashes: fingerprint of the adapters.
    """

    number: int
    name: str
    path: Path
    ranks: dict[str, int]
    merge_options: dict[str, Any]
    base: dict[str, str]
    hashes: dict[str, str]


def header_of(number: int, name: str, base: Mapping[str, str], merge_options: Mapping[str, Any]) -> dict[str, str]:
    """What a journal adds to the header of an adapter file; `journal_entry` reads it."""
    return {"task": str(number), "task_name": name, "base": json.dumps(base), "merge": json.dumps(merge_options)}


def in_journal(file: AdapterFile) -> bool:
    """Whether a journal wrote the file; files of the older format name a task, but neither base nor checksum."""
    return "base" in file.header and file.header["format"] == FORMAT


def journal_entry(file: AdapterFile) -> JournalEntry:
    """What an adapter file that a journal wrote says of itself.

    Raises:
        ValueError: something else wrote it.
    """
    header = file.header
    if not in_journal(file):
        raise ValueError(
            f"{file.path} names no base model (format {header['format']!r}), so nothing shows which weights it belongs "
            "to; a journal holds files of Journal.append. Merge it by itself with `fastlora merge`, or train again."
        )
    try:
        return JournalEntry(
            number=int(header["task"]),
            name=header["task_name"],
            path=Path(file.path),
            ranks={module: file.adapter(module)[2].numel() for module in file.settings},
            merge_options=_mapping(header, "merge"),
            base=_mapping(header, "base"),
            hashes=file.hashes,
        )
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{file.path} does not tell its task, base and merge options ({type(error).__name__}: {error}), so no journal "
            "wrote it. Put back the file of Journal.append."
        ) from error


def _mapping(header: Mapping[str, str], key: str) -> dict[str, Any]:
    found = json.loads(header[key])
    if not isinstance(found, dict) or key == "base" and not all(isinstance(value, str) for value in found.values()):
        raise ValueError(f"{key} is no mapping of names")
    return found


def check_one_base(entries: Sequence[JournalEntry]) -> None:
    """Raises ValueError unless all entries name the same base model."""
    for entry in entries:
        if entry.base != entries[0].base:
            raise ValueError(
                f"{entry.path} belongs to another base model than {entries[0].path}. Give the files of one journal."
            )


def check_kinds(what: str, weights: Mapping[str, Tensor], base: Mapping[str, str]) -> None:
    """Raises ValueError unless `weights`, which messages call `what`, have the names, dtypes and shapes of the base."""
    missing, extra = sorted(set(base) - set(weights)), sorted(set(weights) - set(base))
    if missing or extra:
        raise ValueError(
            f"{what} is another model than the adapters' base: it lacks {some(missing)} and has {some(extra)} besides. "
            "Give the model that they were trained on."
        )
    for name, weight in weights.items():
        wanted = base[name].rpartition(" ")[0]
        if kind(weight) != wanted:
            raise ValueError(
                f"{what} is another model than the adapters' base: {name} is {kind(weight)}, there {wanted}. Give the "
                "model that they were trained on, in its dtype."
            )


def check_untouched(what: str, weights: Mapping[str, Tensor], entries: Sequence[JournalEntry]) -> None:
    """Raises ValueError unless `weights` hold the very bits of the entries' base model."""
    changed = changed_weights(weights, entries[0].base)
    if not changed:
        return
    if updated(what, weights, entries).issuperset(changed):
        cause = "which the adapters update: it has been merged already"
    else:
        cause = "and not all of these are updated by the adapters: it is another model of the same shapes"
    raise ValueError(
        f"{what} differs from the adapters' base model in {len(changed)} of {len(weights)} weights ({some(changed)}), "
        f"{cause}. Load the untouched weights from before task 1."
    )


def changed_weights(weights: Mapping[str, Tensor], base: Mapping[str, str]) -> list[str]:
    """Names of the weights that are not the base model's, bit for bit."""
    return [name for name, found in fingerprint(weights).items() if found != base[name]]


def hosts(what: str, weights: Collection[str], entries: Sequence[JournalEntry]) -> set[str]:
    """Names of the weights that the entries update."""
    return {host_of(weights, module, what) for entry in entries for module in entry.ranks}


def updated(what: str, weights: Mapping[str, Tensor], entries: Sequence[JournalEntry]) -> set[str]:
    """Names of the weights that the entries change: those that they update, and what is tied to them."""
    memory = {weights[name].data_ptr() for name in hosts(what, weights, entries)}
    return {name for name, weight in weights.items() if weight.data_ptr() in memory}
