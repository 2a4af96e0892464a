"""Random streams and batches. Every draw of a run is a function of its seed and of what the draw is for."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from fastlora.continual.distributed import ALONE, World
from fastlora.continual.stream import InMemoryImages, MapStyle


def generator_for(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator that depends on (seed, purpose) alone, such as generator_for(0, "order", task, epoch)."""
    digest = hashlib.sha256(repr((int(seed), *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def epoch_order(images: int, seed: int, task: int, epoch: int) -> Tensor:
    """[images]: the order in which `epoch` of `task` (counted from 1) visits the images."""
    return torch.randperm(images, generator=generator_for(seed, "order", task, epoch))


def batches(data: MapStyle, batch_size: int, seed: int, task: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images [B, 3, H, W] and labels [B], without end; an epoch's last batch may be short, as in the published code.

    Random crops are functions of (seed, task, epoch, place in the epoch) alone, whatever was drawn before.
    """
    return ((images, labels) for images, labels, _ in parts(data, batch_size, seed, task, ALONE))


def parts(data: MapStyle, batch_size: int, seed: int, task: int, world: World) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Of each of these batches the part of this process, crops as in the whole, and B."""
    order = _training_order(len(data), batch_size, seed, task)
    if world.size == 1:
        return _ahead(data, ((indices, generator, None) for indices, generator in order))
    return _ahead(data, ((indices, generator, world.part(len(indices))) for indices, generator in order))


def in_turn(data: MapStyle, indices: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches at these indices, of images that are not trained on."""
    return ((images, labels) for images, labels, _ in _ahead(data, ((part, None, None) for part in indices)))


def in_order(data: MapStyle, batch_size: int, rows: slice = slice(None)) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image once, or those in `rows` (at least one), in the order of the data set."""
    return in_turn(data, torch.arange(len(data))[rows].split(batch_size))


def gather(
    data: MapStyle, indices: Tensor, generator: torch.Generator | None = None, part: slice | None = None
) -> tuple[Tensor, Tensor]:
    """The items at `indices` as one batch, or a part of it.

    A data set with a method `load` makes the batch itself: `load(indices, generator)`, where the generator is for
    random crops and None outside of training. Where several processes train, it is `load(indices, generator, part)`: the
    items at indices[part], cropped as they are in the whole batch.
    """
    own = indices if part is None else indices[part]
    if isinstance(data, InMemoryImages):
        return data.images[own], data.labels[own]
    if hasattr(data, "load"):
        return data.load(indices.tolist(), generator, *(() if part is None else (part,)))
    items = [data[i] for i in own.tolist()]
    return torch.stack([image for image, _ in items]), torch.tensor([int(label) for _, label in items])


def _training_order(images: int, batch_size: int, seed: int, task: int) -> Iterator[tuple[Tensor, torch.Generator]]:
    for epoch in itertools.count():
        for place, indices in enumerate(epoch_order(images, seed, task, epoch).split(batch_size)):
            yield indices, generator_for(seed, "crops", task, epoch, place)


def _ahead(
    data: MapStyle, order: Iterator[tuple[Tensor, torch.Generator | None, slice | None]]
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """The batches of `order`, or the parts of them, and the sizes of the whole; where a data set decodes images, the next
    one while the last one is worked on."""
    if not hasattr(data, "load"):
        for indices, generator, part in order:
            yield *gather(data, indices, generator, part), len(indices)
        return
    with ThreadPoolExecutor(1, "load") as thread:
        waiting = None
        for indices, generator, part in order:
            following = thread.submit(gather, data, indices, generator, part), len(indices)
            if waiting is not None:
                yield *waiting[0].result(), waiting[1]
            waiting = following
        if waiting is not None:
            yield *waiting[0].result(), waiting[1]


def all_labels(data: MapStyle) -> Sequence[int]:
    """Every label in order; reads the images too where the data set does not hold its labels apart."""
    labels = getattr(data, "labels", None)
    if isinstance(labels, Tensor):
        return labels.tolist()
    return [int(data[i][1]) for i in range(len(data))]
