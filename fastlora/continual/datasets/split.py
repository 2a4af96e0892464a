"""Which images belong to training and which to testing, and how few of them are drawn."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastlora.continual.batches import generator_for

SPLIT_SEED = 42  # of the published random splits, which no run changes
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


class DataError(ValueError):
    """Images or their labels on disk are missing, damaged or not what the benchmark needs."""


@dataclass(frozen=True)
class Images:
    """Images in order.

    Args:
        names: paths below the folder of the data set, with "/"; of images in one file, such as "test[17]".
        labels: from 0.
        pixels: uint8 [n, H, W] or [n, H, W, 3] where images are not files of their own.
    """

    names: tuple[str, ...]
    labels: tuple[int, ...]
    pixels: Any = None

    def take(self, indices: Sequence[int]) -> Images:
        """Those at `indices`, in that order."""
        names, labels = tuple(self.names[i] for i in indices), tuple(self.labels[i] for i in indices)
        return Images(names, labels, None if self.pixels is None else self.pixels[list(indices)])


@dataclass(frozen=True)
class Split:
    """A data set: class names in label order, the folder of its images, and the two sides.

    `drawn`: the sides were drawn at random from all classes together, so that a class may have no test image.
    """

    classes: tuple[str, ...]
    folder: Path
    train: Images
    test: Images
    drawn: bool = False


def random_split(images: Images, share: float = 0.8) -> tuple[Images, Images]:
    """torch.utils.data.random_split with seed 42, as published: the first floor(share * n) of a permutation train."""
    order = torch.randperm(len(images.names), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    size = int(share * len(order))
    return images.take(order[:size]), images.take(order[size:])


def split_each_class(images: Images, share: float, name: str) -> tuple[Images, Images]:
    """A random share of every class trains, at least one image of it and never all; the same for every seed of a run.

    Raises:
        DataError: a class has a single image.
    """
    train, test = [], []
    for label in sorted(set(images.labels)):
        own = [i for i, given in enumerate(images.labels) if given == label]
        if len(own) < 2:
            raise DataError(
                f"{name}: {images.names[own[0]]} is the only image of its class; a class that is split needs two. Add "
                "images, or make train and test directories."
            )
        order = torch.randperm(len(own), generator=generator_for(SPLIT_SEED, "split", name, label)).tolist()
        size = min(max(round(share * len(own)), 1), len(own) - 1)
        train += sorted(own[i] for i in order[:size])
        test += sorted(own[i] for i in order[size:])
    return images.take(train), images.take(test)


def few_shot(images: Images, shots: int, seed: int, name: str) -> Images:
    """`shots` images of every class: without replacement where the class has enough, else with, as published (warned).

    The draw is a function of (seed, data set, class and its sorted names): no other data set and no order on disk has
    a part in it. Classes are in label order.
    """
    chosen, short = [], {}
    by_class: dict[int, list[int]] = {}
    for index in sorted(range(len(images.names)), key=images.names.__getitem__):
        by_class.setdefault(images.labels[index], []).append(index)
    for label in sorted(by_class):
        own, generator = by_class[label], generator_for(seed, "shots", name, label)
        if len(own) >= shots:
            drawn = torch.randperm(len(own), generator=generator)[:shots]
        else:
            drawn = torch.randint(len(own), (shots,), generator=generator)
            short[label] = len(own)
        chosen += [own[i] for i in drawn.tolist()]
    if short:
        warnings.warn(
            f"{name}: {len(short)} of {len(by_class)} classes have fewer than {shots} training images (the least "
            f"{min(short.values())}); theirs are drawn with replacement, as published.",
            stacklevel=2,
        )
    return images.take(chosen)


def check_split(name: str, split: Split, classes: int | None = None) -> None:
    """Raises DataError where the split is not one: another number of classes, a class without images, an odd label, an
    image outside of its folder."""
    if classes is not None and len(split.classes) != classes:
        raise DataError(
            f"{name} in {split.folder} has {len(split.classes)} classes; the benchmark is made of {classes}. Unpack the "
            f"data set again, or use --benchmark folders for classes of your own. Found: {_listed(split.classes)}."
        )
    for side, images in (("training", split.train), ("test", split.test)):
        outside = [image for image in images.names if image.startswith("/") or ".." in image.split("/")]
        if outside:
            raise DataError(
                f"{name}: {side} image {outside[0]!r} lies outside of {split.folder}. Names are paths below it; restore its "
                "label files."
            )
        found = Counter(images.labels)
        odd = sorted(label for label in found if not 0 <= label < len(split.classes))
        if odd:
            raise DataError(
                f"{name}: {side} label {odd[0]} is none of its {len(split.classes)} classes. Restore its label files."
            )
        empty = [cls for label, cls in enumerate(split.classes) if not found[label]]
        if empty and not (split.drawn and side == "test"):
            raise DataError(
                f"{name} in {split.folder} has no {side} images of {len(empty)} classes: {_listed(empty)}. Restore them."
            )


def image_names(folder: Path, below: str = "") -> list[str]:
    """Image files directly in `folder`, sorted, as paths that start with `below`; hidden and other files are skipped."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.lower().endswith(SUFFIXES) and entry.is_file()]
    return [f"{below}/{name}" if below else name for name in sorted(names) if not name.startswith(".")]


def folder_names(folder: Path, ignored: Sequence[str] = ()) -> list[str]:
    """Directories in `folder`, sorted; hidden and ignored ones are skipped."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir()]
    return sorted(name for name in names if not name.startswith(".") and name not in ignored)


def images_by_class(folder: Path, classes: Sequence[str]) -> Images:
    """The images of class folders, in the order of the classes.

    Raises:
        DataError: folders without images are named.
    """
    names, labels, empty = [], [], []
    for label, cls in enumerate(classes):
        own = image_names(folder / cls, cls) if (folder / cls).is_dir() else []
        empty += [] if own else [str(folder / cls)]
        names += own
        labels += [label] * len(own)
    if empty:
        raise DataError(
            f"no images in {_listed(empty)}. Images lie directly in their class's folder; fill it or remove it."
        )
    return Images(tuple(names), tuple(labels))


def _listed(names: Sequence[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more
