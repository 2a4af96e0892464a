"""The published splits of the eleven data sets, as torchvision reads them; 80/20 where there is none.

A reader gets the data set's directory and the one of its images, and gives class names, training and test images. It
reads the files itself: torchvision's classes want their own layout and check sums, download, and decode.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastlora.continual.datasets import names
from fastlora.continual.datasets.formats import read_idx, read_json, read_lines, read_mat, read_pickle
from fastlora.continual.datasets.split import (
    DataError,
    Images,
    Split,
    folder_names,
    images_by_class,
    random_split,
)


def aircraft(home: Path, folder: Path) -> Split:
    """Variants; their names may hold a "/" (F-16A/B)."""
    classes = read_lines(home / "variants.txt")

    def side(file: str) -> Images:
        rows = [line.partition(" ")[::2] for line in read_lines(home / file)]
        return _labelled([(f"{image}.jpg", variant) for image, variant in rows], classes, home / file)

    return Split(tuple(classes), folder, side("images_variant_train.txt"), side("images_variant_test.txt"))


def caltech101(home: Path, folder: Path) -> Split:
    """Every category but the background, both kinds of faces included."""
    folders = folder_names(folder, ignored=("BACKGROUND_Google",))
    return Split(
        names.readable(folders, names.CALTECH101), folder, *random_split(images_by_class(folder, folders)), True
    )


def cifar100(home: Path, folder: Path) -> Split:
    classes = names.readable(read_pickle(home / "meta")["fine_label_names"])

    def side(file: str) -> Images:
        content = read_pickle(home / file)
        pixels = np.asarray(content["data"], np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return _pixels(file, pixels, content["fine_labels"], home / file)

    return Split(classes, folder, side("train"), side("test"))


def dtd(home: Path, folder: Path) -> Split:
    """The first of its ten partitions."""
    files = {side: read_lines(home / "labels" / f"{side}1.txt") for side in ("train", "test")}
    classes = sorted({line.partition("/")[0] for lines in files.values() for line in lines})
    train, test = (
        _labelled([(line, line.partition("/")[0]) for line in files[side]], classes, home) for side in ("train", "test")
    )
    return Split(names.readable(classes), folder, train, test)


def eurosat(home: Path, folder: Path) -> Split:
    """Folders in CamelCase."""
    folders = folder_names(folder)
    return Split(names.readable(folders, names.EUROSAT), folder, *random_split(images_by_class(folder, folders)), True)


def flowers(home: Path, folder: Path) -> Split:
    """Labels and image numbers of its files count from 1. No file of it names the classes."""
    labels = read_mat(home / "imagelabels.mat")["labels"]
    sets = read_mat(home / "setid.mat")

    def side(key: str) -> Images:
        numbers = [int(number) for number in sets[key]]
        return Images(
            tuple(f"image_{number:05d}.jpg" for number in numbers),
            tuple(int(labels[number - 1]) - 1 for number in numbers),
        )

    return Split(names.FLOWERS, folder, side("trnid"), side("tstid"))


def food101(home: Path, folder: Path) -> Split:
    files = {side: read_json(home / "meta" / f"{side}.json") for side in ("train", "test")}
    classes = sorted(files["train"])
    train, test = (
        _labelled([(f"{image}.jpg", cls) for cls in sorted(files[side]) for image in files[side][cls]], classes, home)
        for side in ("train", "test")
    )
    return Split(names.readable(classes), folder, train, test)


def mnist(home: Path, folder: Path) -> Split:
    def side(name: str, file: str) -> Images:
        pixels, labels = read_idx(home / f"{file}-images-idx3-ubyte"), read_idx(home / f"{file}-labels-idx1-ubyte")
        return _pixels(name, pixels, labels.tolist(), home / f"{file}-images-idx3-ubyte")

    return Split(names.MNIST, folder, side("train", "train"), side("test", "t10k"))


def oxford_pet(home: Path, folder: Path) -> Split:
    """Breeds in the order of their numbers, which count from 1. Other files lie between the images."""
    breeds: dict[int, str] = {}

    def side(file: str) -> Images:
        rows = [line.split() for line in read_lines(home / "annotations" / file)]
        breeds.update({int(row[1]) - 1: row[0].rpartition("_")[0] for row in rows})
        return Images(tuple(f"{row[0]}.jpg" for row in rows), tuple(int(row[1]) - 1 for row in rows))

    train, test = side("trainval.txt"), side("test.txt")
    classes = [" ".join(word.title() for word in breeds[label].split("_")) for label in sorted(breeds)]
    return Split(tuple(classes), folder, train, test)


def stanford_cars(home: Path, folder: Path) -> Split:
    classes = read_mat(home / "devkit" / "cars_meta.mat")["class_names"]

    def side(images: str, file: Path) -> Images:
        rows = read_mat(file)["annotations"]
        if not all("class" in row for row in rows):
            raise DataError(f"{file} holds no labels. Use the file whose name ends in _withlabels.mat.")
        return Images(tuple(f"{images}/{row['fname']}" for row in rows), tuple(int(row["class"]) - 1 for row in rows))

    train = side("cars_train", home / "devkit" / "cars_train_annos.mat")
    return Split(tuple(map(str, classes)), folder, train, side("cars_test", home / "cars_test_annos_withlabels.mat"))


def sun397(home: Path, folder: Path) -> Split:
    """Classes may lie in classes' folders (a/apartment_building/outdoor), below the folder of their first letter.

    Its published 80/20 split follows the order in which a file system lists 108,754 files; here it follows the class
    list, sorted within a class.
    """
    listed = next((path for path in (folder / "ClassName.txt", home / "ClassName.txt") if path.is_file()), None)
    lines = read_lines(listed or folder / "ClassName.txt")
    classes = [line.strip("/") for line in lines]
    short = [cls.partition("/")[2] for cls in classes]
    return Split(names.readable(short), folder, *random_split(images_by_class(folder, classes)), True)


def _labelled(rows: Sequence[tuple[str, str]], classes: Sequence[str], source: Path) -> Images:
    """Images with the names of their classes."""
    number = {name: label for label, name in enumerate(classes)}
    for image, name in rows:
        if name not in number:
            raise DataError(f"{source} says that {image} is {name!r}, which is none of its {len(classes)} classes.")
    return Images(tuple(image for image, _ in rows), tuple(number[name] for _, name in rows))


def _pixels(side: str, pixels: np.ndarray, labels: Sequence[int], source: Path) -> Images:
    if len(pixels) != len(labels):
        raise DataError(f"{source} holds {len(pixels)} images with {len(labels)} labels. Download it again.")
    return Images(tuple(f"{side}[{i}]" for i in range(len(pixels))), tuple(map(int, labels)), pixels)
