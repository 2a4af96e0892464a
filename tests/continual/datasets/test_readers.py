"""The published splits, in both layouts, against torchvision's own classes where these read the same files."""

import warnings

import pytest
import torch
import torchvision
from continual.datasets import layouts

from fastlora.continual.datasets import names
from fastlora.continual.datasets.catalogue import SOURCES
from fastlora.continual.datasets.coop import coop_split
from fastlora.continual.datasets.protocols import MTIL_ORDERS, XTAIL_ORDER
from fastlora.continual.datasets.split import check_split


def read(name, root):
    source = SOURCES[name]
    return source.published(root)


@pytest.fixture
def no_checksums(monkeypatch):
    """torchvision compares files with those of the real data sets."""
    monkeypatch.setattr("torchvision.datasets.cifar.CIFAR100._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda *_: True)


def torchvision_sides(name, root):
    """[(path or pixels, label), ...] of training and test data, and the classes."""
    sets = torchvision.datasets
    make = {
        "Aircraft": lambda s: sets.FGVCAircraft(root, s),
        "CIFAR100": lambda s: sets.CIFAR100(root, train=s == "train"),
        "DTD": lambda s: sets.DTD(root, s),
        "Flowers": lambda s: sets.Flowers102(root, s),
        "Food": lambda s: sets.Food101(root, s),
        "MNIST": lambda s: sets.MNIST(root, train=s == "train"),
        "OxfordPet": lambda s: sets.OxfordIIITPet(root, "trainval" if s == "train" else s),
        "StanfordCars": lambda s: sets.StanfordCars(root, s),
    }[name]
    return make("train"), make("test")


def labels_of(data):
    for key in ("_labels", "targets"):
        if hasattr(data, key):
            return [int(label) for label in getattr(data, key)]
    return [int(label) for _, label in data._samples]


def files_of(data):
    if hasattr(data, "_samples"):
        return [str(path) for path, _ in data._samples]
    return [str(path) for path in (data._images if hasattr(data, "_images") else data._image_files)]


@pytest.mark.parametrize("name", ["Aircraft", "DTD", "Flowers", "Food", "OxfordPet", "StanfordCars"])
def test_files_and_labels_are_those_of_torchvision(name, roots, no_checksums):
    split = read(name, roots["torchvision"])
    for own, theirs in zip((split.train, split.test), torchvision_sides(name, roots["torchvision"])):
        expected = sorted(zip(files_of(theirs), labels_of(theirs)))
        assert sorted((str(split.folder / file), label) for file, label in zip(own.names, own.labels)) == expected
        if name not in ("Flowers", "DTD", "Food"):
            assert list(split.classes) == list(theirs.classes)


@pytest.mark.parametrize("name", ["CIFAR100", "MNIST"])
def test_pixels_and_labels_are_those_of_torchvision(name, roots, no_checksums):
    split = read(name, roots["torchvision"])
    for own, theirs in zip((split.train, split.test), torchvision_sides(name, roots["torchvision"])):
        assert list(own.labels) == labels_of(theirs)
        assert (own.pixels == (theirs.data.numpy() if name == "MNIST" else theirs.data)).all()
    classes = [name.replace("_", " ") for name in theirs.classes]
    assert list(split.classes) == classes


@pytest.mark.parametrize("name", ["Caltech101", "EuroSAT"])
def test_drawn_splits_are_the_published_ones(name, roots):
    """torch.utils.data.random_split of torchvision's data set, seed 42."""
    root = roots["torchvision"]
    if name == "EuroSAT":
        data = torchvision.datasets.EuroSAT(root)
        every = [(path, label) for path, label in data.samples]
    else:
        # torchvision counts a stray file as an image
        stray = root / "caltech101" / "101_ObjectCategories" / "ant" / "Thumbs.db"
        content = stray.read_bytes()
        stray.unlink()
        data = torchvision.datasets.Caltech101(root)
        stray.write_bytes(content)
        every = [
            (f"{data.root}/101_ObjectCategories/{data.categories[label]}/image_{index:04d}.jpg", label)
            for index, label in zip(data.index, data.y)
        ]
    sizes = [int(0.8 * len(every)), len(every) - int(0.8 * len(every))]
    expected = torch.utils.data.random_split(range(len(every)), sizes, torch.Generator().manual_seed(42))
    split = read(name, root)
    for own, part in zip((split.train, split.test), expected):
        assert [(str(split.folder / f), n) for f, n in zip(own.names, own.labels)] == [every[i] for i in part.indices]


def test_sun397_has_torchvisions_classes_and_labels(roots):
    data = torchvision.datasets.SUN397(roots["torchvision"])
    split = read("SUN397", roots["torchvision"])
    assert list(split.classes) == [name.replace("_", " ") for name in data.classes]
    ours = {str(split.folder / f): n for side in (split.train, split.test) for f, n in zip(side.names, side.labels)}
    assert ours == dict(zip(map(str, data._image_files), data._labels))
    assert (len(split.train.names), len(split.test.names)) == (2540, 636)


@pytest.mark.parametrize("name", SOURCES)
def test_both_layouts_hold_the_same(name, roots):
    """Names, labels and order: so the few-shot draw and the hashes of the manifest are the same, too."""
    coop, torchvision_ = (read(name, roots[layout]) for layout in ("coop", "torchvision"))
    assert (coop.classes, coop.train.names, coop.train.labels) == (
        torchvision_.classes, torchvision_.train.names, torchvision_.train.labels,
    )  # fmt: skip
    assert (coop.test.names, coop.test.labels) == (torchvision_.test.names, torchvision_.test.labels)
    for split in (coop, torchvision_):
        check_split(name, split, SOURCES[name].classes)
        if split.train.pixels is None:
            assert all((split.folder / file).is_file() for side in (split.train, split.test) for file in side.names)


@pytest.mark.parametrize("name", XTAIL_ORDER)
def test_splits_of_coop_in_both_layouts(name, root):
    source = SOURCES[name]
    split = coop_split(source, root)
    check_split(name, split, source.coop_classes or source.classes)
    if name != "MNIST":
        assert all((split.folder / file).is_file() for side in (split.train, split.test) for file in side.names)
    assert not any("_" in cls for cls in split.classes)


def test_sizes_of_the_benchmarks():
    assert sum(SOURCES[name].classes for name in MTIL_ORDERS["I"]) == 1201
    assert sum(SOURCES[name].coop_classes or SOURCES[name].classes for name in XTAIL_ORDER) == 1100
    assert sorted(MTIL_ORDERS["I"]) == sorted(MTIL_ORDERS["II"]) and len(MTIL_ORDERS["II"]) == 11
    assert MTIL_ORDERS["I"][0] == "Aircraft" and MTIL_ORDERS["II"][0] == "StanfordCars"
    assert XTAIL_ORDER == tuple(name for name in MTIL_ORDERS["I"] if name != "CIFAR100")


# ---- traps, one by one


def test_aircraft_variants_with_a_slash(root):
    split = read("Aircraft", root)
    assert {"F-16A/B", "F/A-18"} < set(split.classes)
    images = [file for file, label in zip(split.train.names, split.train.labels) if split.classes[label] == "F/A-18"]
    assert len(images) == layouts.TRAIN and all("/" not in file for file in images)


def test_caltech_has_both_kinds_of_faces_in_mtil_and_one_in_xtail(root):
    mtil = read("Caltech101", root)
    assert mtil.classes[:3] == ("off-center face", "centered face", "leopard") and len(mtil.classes) == 101
    assert not any("BACKGROUND" in file for file in (*mtil.train.names, *mtil.test.names))
    assert not any(file.endswith("Thumbs.db") for file in (*mtil.train.names, *mtil.test.names))
    xtail = coop_split(SOURCES["Caltech101"], root)
    assert xtail.classes[:2] == ("face", "leopard") and "ceiling fan" in xtail.classes and len(xtail.classes) == 100


def test_flowers_count_from_one(root):
    split = read("Flowers", root)
    assert split.train.names[0] == "image_00001.jpg" and split.train.labels[0] == 0
    assert min(split.test.labels) == 0 and max(split.test.labels) == 101
    assert split.classes[0] == "pink primrose" and split.classes[-1] == "blackberry lily"


def test_names_of_flowers_are_those_of_torchvision_less_a_question_mark():
    known = getattr(torchvision.datasets.Flowers102, "classes", None)
    if known is None:
        pytest.skip("this torchvision does not name the flowers")
    assert [name.rstrip("?") for name in known] == list(names.FLOWERS)


def test_names_of_eurosat(root):
    assert read("EuroSAT", root).classes[2] == "brushland or shrubland"
    assert coop_split(SOURCES["EuroSAT"], root).classes[9] == "Sea or Lake satellite location"


def test_names_of_mnist(root):
    assert read("MNIST", root).classes[0] == "0 - zero"
    assert coop_split(SOURCES["MNIST"], root).classes[0] == 'number: "0 - zero"'


def test_nested_names_of_sun(root):
    assert read("SUN397", root).classes[1] == "apartment building/outdoor"
    assert coop_split(SOURCES["SUN397"], root).classes[1] == "outdoor apartment building"


def test_sun_is_split_alike_whatever_order_a_file_system_lists(roots, monkeypatch):
    import os

    expected, scandir = read("SUN397", roots["coop"]), os.scandir

    class Backwards:
        def __init__(self, path):
            self.entries = sorted(scandir(path), key=lambda entry: entry.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    assert read("SUN397", roots["coop"]) == expected


def test_pets_have_titles_in_mtil_and_lower_case_in_xtail(root):
    assert read("OxfordPet", root).classes[1] == "American Bulldog"
    assert coop_split(SOURCES["OxfordPet"], root).classes[1] == "american bulldog"


def test_cars_put_the_year_last_in_mtil_and_first_in_xtail(root):
    assert read("StanfordCars", root).classes[1] == "Ram C/V Cargo Van Minivan 2012"
    assert coop_split(SOURCES["StanfordCars"], root).classes[1] == "2012 Ram C/V Cargo Van Minivan"


def test_packed_files_of_mnist(tmp_path):
    import gzip

    layouts.mnist(tmp_path, "torchvision")
    expected = read("MNIST", tmp_path)
    for path in list((tmp_path / "MNIST" / "raw").iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    packed = read("MNIST", tmp_path)
    assert packed.train.labels == expected.train.labels and (packed.test.pixels == expected.test.pixels).all()


def test_nothing_warns(root):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in SOURCES:
            read(name, root)
