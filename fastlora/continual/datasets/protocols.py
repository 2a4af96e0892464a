"""The benchmarks mtil, xtail and folders: which data sets in which order, with which split, shots and prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlora.continual.config import RunConfig, UsageError
from fastlora.continual.configs.data import FolderTask
from fastlora.continual.datasets import prompts
from fastlora.continual.datasets.catalogue import SOURCES
from fastlora.continual.datasets.coop import coop_split
from fastlora.continual.datasets.disk_cache import DiskCache
from fastlora.continual.datasets.folders import folder_split
from fastlora.continual.datasets.images import Decoder, LazyImages
from fastlora.continual.datasets.reference import reference_data
from fastlora.continual.datasets.split import DataError, Split, check_split, few_shot
from fastlora.continual.datasets.transforms import Transforms
from fastlora.continual.datasets.verify import check_images
from fastlora.continual.stream import Task, TaskStream

MTIL_ORDERS = {
    "I": tuple(SOURCES),
    "II": (
        "StanfordCars", "Food", "MNIST", "OxfordPet", "Flowers", "SUN397", "Aircraft", "Caltech101", "DTD", "EuroSAT",
        "CIFAR100",
    ),
}  # fmt: skip
XTAIL_ORDER = tuple(name for name in SOURCES if name != "CIFAR100")


@dataclass(frozen=True)
class Part:
    """What a task is made of, before any image is opened."""

    name: str
    split: Split
    templates: tuple[str, ...]


def check_options(config: RunConfig) -> None:
    """Raises UsageError unless the benchmark was told where its images are."""
    if config.data.root is None:
        raise UsageError(
            f"the benchmark {config.benchmark!r} reads images from disk; say where with --data.root DIR. "
            "docs/benchmarks.md shows what lies in it."
        )
    if not Path(config.data.root).is_dir():
        raise UsageError(f"data.root is {config.data.root!r}, which is no directory. Give the one of the data sets.")
    if config.benchmark == "folders" and not config.data.tasks:
        raise UsageError("the benchmark 'folders' needs data.tasks: a list of directories below data.root, in order.")
    if config.data.cache_crops and config.data.cache_dir is None:
        raise UsageError("data.cache_crops is true, but there is no cache to keep crops in. Give --data.cache_dir DIR.")


@dataclass(frozen=True)
class Found:
    """What a benchmark is made of, read and looked at, before there is a model to say what becomes of its images."""

    config: RunConfig
    parts: list[Part]
    decoder: Decoder

    def stream(self, transforms: Transforms) -> TaskStream:
        """The tasks.

        Raises:
            DataError: the reference data are missing or damaged.
        """
        data = self.config.data
        folder, captions = (Path(path) if path else None for path in (data.reference, data.captions))
        reference = reference_data(folder, captions, transforms, self.decoder, data.verify or "headers")
        tasks = [_task(part, transforms, self.decoder) for part in self.parts]
        return TaskStream(self.config.benchmark, tasks, reference=reference)


def find_images(config: RunConfig) -> Found:
    """The parts of a benchmark whose options are complete; every label file is read and every image looked at.

    Raises:
        DataError: something is missing, damaged or not what the benchmark is made of. Faults of all data sets are told
            at once; nothing has been trained.
        UsageError: data.cache_dir is neither a cache nor can it become one.
    """
    data = config.data
    disk = DiskCache(Path(data.cache_dir), int((data.cache_dir_gb or 0) * 1e9)) if data.cache_dir else None
    decoder = Decoder(data.workers, int((data.cache_gb or 0) * 1e9), disk, bool(data.cache_crops))
    parts = [_shots(part, config) for part in _parts(config)]
    files = (
        part.split.folder / name
        for part in parts
        for side in (part.split.train, part.split.test)
        if side.pixels is None
        for name in side.names
    )
    check_images(files, decoder, data.verify or "headers")
    return Found(config, parts, decoder)


def _root(config: RunConfig) -> Path:
    assert config.data.root is not None  # check_options saw to it
    return Path(config.data.root)


def _mtil(config: RunConfig, name: str) -> Part:
    source = SOURCES[name]
    split = source.published(_root(config))
    check_split(name, split, source.classes)
    return Part(name, split, prompts.MTIL[name])


def _xtail(config: RunConfig, name: str) -> Part:
    source = SOURCES[name]
    split = coop_split(source, _root(config))
    check_split(name, split, source.coop_classes or source.classes)
    return Part(name, split, prompts.SINGLE if config.data.prompts == "single" else prompts.XTAIL[name])


def _folder(config: RunConfig, given: str | dict[str, Any]) -> Part:
    task = FolderTask.of(given)
    name, split = folder_split(task, _root(config), config.data.split)
    check_split(name, split)
    return Part(name, split, task.templates or tuple(config.data.templates or ()))


# benchmark -> (what its tasks are made of, what makes a part of one)
_PROTOCOLS: dict[str, tuple[Callable[[RunConfig], Sequence[Any]], Callable[[RunConfig, Any], Part]]] = {
    "mtil": (lambda config: MTIL_ORDERS[config.data.order or "I"], _mtil),
    "xtail": (lambda config: XTAIL_ORDER, _xtail),
    "folders": (lambda config: config.data.tasks or (), _folder),
}


def _parts(config: RunConfig) -> list[Part]:
    """Every data set, or one error that tells what is wrong with each that cannot be used."""
    listed, make = _PROTOCOLS[config.benchmark]
    parts, faults, entries = [], [], listed(config)
    for entry in entries:
        try:
            parts.append(make(config, entry))
        except DataError as error:
            faults.append(_placed(entry, str(error)))
    if faults:
        count = f"{len(faults)} of {len(entries)} data sets cannot be used:\n" if len(faults) > 1 else ""
        raise DataError(count + "\n".join(faults))
    return parts


def _placed(entry: Any, fault: str) -> str:
    """The fault, with the name of a published data set and what lies where."""
    if not isinstance(entry, str) or entry not in SOURCES or fault.startswith(entry):
        return fault
    return f"{entry}: {fault.rstrip('.')}. {SOURCES[entry].where(SOURCES[entry].files)}"


def _shots(part: Part, config: RunConfig) -> Part:
    shots, split = config.data.shots, part.split
    if not shots:
        return part
    train = few_shot(split.train, shots, config.seed, part.name)
    return dataclasses.replace(part, split=dataclasses.replace(split, train=train))


def _task(part: Part, transforms: Transforms, decoder: Decoder) -> Task:
    split = part.split
    train, test = (
        LazyImages(split.folder, side, transforms, decoder, training=training)
        for side, training in ((split.train, True), (split.test, False))
    )
    return Task(part.name, split.classes, part.templates, train, test)
