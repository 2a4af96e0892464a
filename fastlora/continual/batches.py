"""Random streams and batches. Every draw of a run is a function of its seed and of what the draw is for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastlora.continual.stream import InMemoryImages


def generator_for(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator that depends on (seed, purpose) alone, such as generator_for(0, "order", task, epoch)."""
    digest = hashlib.sha256(repr((int(seed), *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def epoch_order(images: int, seed: int, task: int, epoch: int) -> Tensor:
    """[images]: the order in which `epoch` of `task` (counted from 1) visits the images."""
    return torch.randperm(images, generator=generator_for(seed, "order", task, epoch))


def batches(data: Dataset, batch_size: int, seed: int, task: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images [B, 3, H, W] and labels [B], without end; an epoch's last batch may be short, as in the published code."""
    epoch = 0
    while True:
        for indices in epoch_order(len(data), seed, task, epoch).split(batch_size):
            yield gather(data, indices)
        epoch += 1


def gather(data: Dataset, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The items at `indices` as one batch."""
    if isinstance(data, InMemoryImages):
        return data.images[indices], data.labels[indices]
    items = [data[i] for i in indices.tolist()]
    return torch.stack([image for image, _ in items]), torch.tensor([int(label) for _, label in items])


def all_labels(data: Dataset) -> Sequence[int]:
    """Every label in order; reads the images too where the data set does not hold its labels apart."""
    labels = getattr(data, "labels", None)
    if isinstance(labels, Tensor):
        return labels.tolist()
    return [int(data[i][1]) for i in range(len(data))]
