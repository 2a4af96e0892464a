"""Data sets of the user's own: class folders of images, in train and test directories or split at random."""

from __future__ import annotations

from pathlib import Path

from fastlora.continual.configs.data import FolderTask
from fastlora.continual.datasets.names import readable
from fastlora.continual.datasets.split import (
    DataError,
    Images,
    Split,
    folder_names,
    image_names,
    images_by_class,
    split_each_class,
)

SIDES = ("train", "test")


def folder_split(task: FolderTask, root: Path, share: float | None) -> tuple[str, Split]:
    """(name of the task, its split). Class names are the folders' names, with spaces for underscores.

    Args:
        share: of each class that trains, where the directory has no train and test directories.
    Raises:
        DataError: no directory, no classes, classes that differ between the sides, or no share where one is needed.
    """
    folder = root / task.path
    name = task.name or folder.name
    if not folder.is_dir():
        raise DataError(f"task {name!r}: {folder} is no directory. Correct data.tasks or data.root.")
    sides = [side for side in SIDES if (folder / side).is_dir()]
    if len(sides) == 1:
        other = SIDES[1 - SIDES.index(sides[0])]
        raise DataError(f"task {name!r}: {folder} has {sides[0]}/ and no {other}/. Make it, or do without both.")
    if sides:
        return name, _two_sides(name, folder)
    if share is None:
        raise DataError(
            f"task {name!r}: {folder} has neither train/ nor test/. Make both, or give the share of its images that is "
            "for training, such as --data.split 0.8."
        )
    classes = _classes(name, folder)
    images = images_by_class(folder, classes)
    return name, Split(readable(classes), folder, *split_each_class(images, share, name))


def _two_sides(name: str, folder: Path) -> Split:
    train, test = (_classes(name, folder / side) for side in SIDES)
    if train != test:
        parts = [
            f"{side} alone has {', '.join(map(repr, sorted(own)))}"
            for side, own in (("train", set(train) - set(test)), ("test", set(test) - set(train)))
            if own
        ]
        raise DataError(f"task {name!r}: the classes of {folder} differ; {'; '.join(parts)}. Make them the same.")
    own = [(side, images_by_class(folder / side, train)) for side in SIDES]
    training, testing = (
        Images(tuple(f"{side}/{name}" for name in images.names), images.labels) for side, images in own
    )
    return Split(readable(train), folder, training, testing)


def _classes(name: str, folder: Path) -> list[str]:
    classes = folder_names(folder)
    if not classes:
        loose = " It holds images, but no folders." if image_names(folder) else ""
        raise DataError(f"task {name!r}: {folder} has no class folders.{loose} Make one folder of images per class.")
    return classes
