"""What is missing or damaged stops a run before it starts, and the message says what goes where."""

import dataclasses
import json
import os
import pickle
import shutil
import sys

import pytest
from continual.datasets import layouts

from fastlora.continual.config import DataConfig, UsageError
from fastlora.continual.datasets import check_options, find_images
from fastlora.continual.datasets.catalogue import SOURCES
from fastlora.continual.datasets.coop import coop_split
from fastlora.continual.datasets.formats import read_idx, read_pickle
from fastlora.continual.datasets.images import Decoder
from fastlora.continual.datasets.split import DataError, check_split
from fastlora.continual.datasets.verify import check_images


def read(name, root):
    source = SOURCES[name]
    split = source.published(root)
    check_split(name, split, source.classes)
    return split


@pytest.mark.parametrize("name", SOURCES)
def test_a_missing_data_set_says_where_both_layouts_have_it(name, tmp_path):
    source = SOURCES[name]
    with pytest.raises(DataError) as error:
        read(name, tmp_path)
    message = str(error.value)
    assert f"{name}: neither layout is in {tmp_path}" in message and f"Download it from {source.page}" in message
    for place in (source.coop, source.torchvision):
        assert str(place) in message
        assert all(f"{place.home}/{file}" in message for file in source.files)


@pytest.mark.parametrize("name", [name for name in SOURCES if SOURCES[name].files and name != "CIFAR100"])
@pytest.mark.parametrize("layout", ["coop", "torchvision"])
def test_a_missing_label_file_is_named(name, layout, tmp_path):
    layouts.MAKERS[name](tmp_path, layout)
    home = tmp_path / getattr(SOURCES[name], layout).home
    (home / SOURCES[name].files[-1]).unlink()
    with pytest.raises(DataError, match=f"{name}: {home / SOURCES[name].files[-1]} is missing. In .*: images in"):
        read(name, tmp_path)


@pytest.mark.parametrize("layout", ["coop", "torchvision"])
def test_a_missing_split_of_coop_is_named(layout, tmp_path):
    layouts.dtd(tmp_path, layout)
    home = tmp_path / SOURCES["DTD"].__getattribute__(layout).home
    (home / "split_zhou_DescribableTextures.json").unlink()
    with pytest.raises(DataError, match=f"{home}/split_zhou_Desc.*json is missing.*from the links in DATASETS.md"):
        coop_split(SOURCES["DTD"], tmp_path)


def test_every_fault_is_told_at_once(roots, tmp_path, config, transforms):
    shutil.copytree(roots["coop"], tmp_path / "data", copy_function=os.link)
    shutil.rmtree(tmp_path / "data" / "fgvc_aircraft")
    (tmp_path / "data" / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    (tmp_path / "data" / "sun397" / "SUN397" / "ClassName.txt").unlink()
    with pytest.raises(DataError) as error:
        find_images(config("mtil", tmp_path / "data")).stream(transforms)
    message = str(error.value)
    assert message.startswith("3 of 11 data sets cannot be used:\nAircraft: neither layout")
    assert (
        "\nMNIST: " in message and "t10k-labels-idx1-ubyte is missing. In both layouts: images in MNIST/raw/" in message
    )
    assert "\nSUN397: " in message and "SUN397/ClassName.txt is missing" in message


@pytest.mark.parametrize(("name", "folder"), [("Caltech101", "accordion"), ("EuroSAT", "River"), ("SUN397", "a/abbey")])
def test_an_empty_class_is_named(name, folder, tmp_path):
    layouts.MAKERS[name](tmp_path, "coop")
    images = tmp_path / str(SOURCES[name].coop) / folder
    for path in images.iterdir():
        path.unlink()
    with pytest.raises(DataError, match=f"no images in '{images}'"):
        read(name, tmp_path)


def test_a_missing_class_is_not_another_benchmark(tmp_path):
    layouts.caltech101(tmp_path, "coop")
    shutil.rmtree(tmp_path / "caltech-101" / "101_ObjectCategories" / "yin_yang")
    with pytest.raises(DataError, match="has 100 classes; the benchmark is made of 101.*--benchmark folders"):
        read("Caltech101", tmp_path)


def test_a_class_without_training_images_is_named(tmp_path):
    layouts.dtd(tmp_path, "coop")
    path = tmp_path / "dtd" / "labels" / "train1.txt"
    path.write_text("\n".join(line for line in path.read_text().split() if not line.startswith("blotchy")))
    with pytest.raises(DataError, match="no training images of 1 classes: 'blotchy'"):
        read("DTD", tmp_path)


@pytest.mark.parametrize("image", ["../../etc/passwd", "banded/../../x.jpg", "/etc/passwd"])
def test_an_image_outside_of_its_data_set_is_named(tmp_path, image):
    layouts.dtd(tmp_path, "coop")
    split = read("DTD", tmp_path)
    split = dataclasses.replace(split, test=dataclasses.replace(split.test, names=(*split.test.names[:-1], image)))
    with pytest.raises(DataError, match=f"DTD: test image '{image}' lies outside of .*images. Names are paths below"):
        check_split("DTD", split, SOURCES["DTD"].classes)


def test_an_unknown_variant_is_named(tmp_path):
    layouts.aircraft(tmp_path, "coop")
    path = tmp_path / "fgvc_aircraft" / "images_variant_test.txt"
    path.write_text(path.read_text() + "1999999 Boeing 797\n")
    with pytest.raises(DataError, match="images_variant_test.txt says that 1999999.jpg is 'Boeing 797'"):
        read("Aircraft", tmp_path)


def test_cars_without_test_labels(tmp_path):
    """The devkit's own test file holds boxes alone."""
    import numpy as np
    from scipy.io import savemat

    layouts.stanford_cars(tmp_path, "coop")
    rows = np.array([(1, "00001.jpg")], dtype=[("bbox_x1", "O"), ("fname", "O")])
    savemat(tmp_path / "stanford_cars" / "cars_test_annos_withlabels.mat", {"annotations": rows})
    with pytest.raises(DataError, match="holds no labels. Use the file whose name ends in _withlabels.mat"):
        read("StanfordCars", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (json.dumps({"train": []}), r"no rows of \[image, label, class\] under 'test'"),
        (json.dumps({"train": [["a.jpg", 0]], "test": []}), "no rows of .* under 'train'"),
        (
            json.dumps({"train": [["a.jpg", 0, "x"]], "test": [["b.jpg", 0, "y"]]}),
            "calls label 0 'x' and, for b.jpg, 'y'",
        ),
        (json.dumps({"train": [["a.jpg", 0, "x"], ["b.jpg", 2, "y"]], "test": []}), "2 classes and no label 1"),
    ],
)
def test_a_damaged_split_of_coop(tmp_path, content, message):
    layouts.dtd(tmp_path, "coop")
    (tmp_path / "dtd" / "split_zhou_DescribableTextures.json").write_text(content)
    with pytest.raises(DataError, match=message):
        coop_split(SOURCES["DTD"], tmp_path)


def test_a_pickle_runs_no_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "harm"), "w")

    (tmp_path / "train").write_bytes(pickle.dumps({"data": Payload()}))
    with pytest.raises(DataError, match="is not a readable pickle of CIFAR .it wants io.open"):
        read_pickle(tmp_path / "train")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "content", [b"", b"\0\0\x08", b"\0\0\x0d\x01\0\0\0\1\0", b"\0\0\x08\x01\0\0\0\5abc", b"<html>"]
)
def test_a_damaged_idx_file(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DataError, match="is not an idx file of bytes, or not whole"):
        read_idx(tmp_path / "file")
    (tmp_path / "other.gz").write_bytes(b"\x1f\x8b damaged")
    with pytest.raises(DataError, match="other.gz cannot be unpacked"):
        read_idx(tmp_path / "other")


def test_scipy_is_asked_for_by_name(tmp_path, monkeypatch):
    layouts.flowers(tmp_path, "coop")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ImportError, match="imagelabels.mat is a MATLAB file, and scipy.*pip install scipy"):
        read("Flowers", tmp_path)


def test_a_damaged_matlab_file(tmp_path):
    layouts.flowers(tmp_path, "coop")
    (tmp_path / "oxford_flowers" / "setid.mat").write_bytes(b"<html>404</html>")
    with pytest.raises(DataError, match="setid.mat is not a readable MATLAB file"):
        read("Flowers", tmp_path)


# ---- the look at every image


@pytest.fixture
def damaged(roots, tmp_path):
    """DTD and its likes with a missing test image, one that is no image, and a truncated one."""
    root = tmp_path / "data"
    shutil.copytree(roots["coop"], root, copy_function=os.link)
    images, whole = root / "dtd" / "images", layouts.jpeg((10, 20, 30), (200, 200))
    for name, content in (
        ("banded/banded_0005.jpg", None),
        ("blotchy/blotchy_0004.jpg", b"<html>404</html>"),
        ("kind_00/kind_00_0005.jpg", whole[: len(whole) // 2]),
    ):
        (images / name).unlink()  # a link to the file of all tests
        if content:
            (images / name).write_bytes(content)
    return root


def test_missing_and_damaged_images_are_counted_and_named(damaged, config, transforms):
    with pytest.raises(DataError) as error:
        find_images(config("xtail", damaged, shots=2)).stream(transforms)
    message = str(error.value)
    assert "1 are missing and 1 cannot be read" in message and "Nothing was trained" in message
    assert f"{damaged}/dtd/images/banded/banded_0005.jpg: missing" in message
    assert f"{damaged}/dtd/images/blotchy/blotchy_0004.jpg: cannot identify" in message


def test_decoding_finds_truncated_images_too(damaged, config, transforms):
    with pytest.raises(DataError, match="1 are missing and 2 cannot be read(.|\n)*kind_00_0005.jpg: "):
        find_images(config("xtail", damaged, shots=2, verify="decode")).stream(transforms)


def test_images_that_are_not_drawn_are_not_looked_at(damaged, config, transforms):
    (damaged / "dtd" / "images" / "banded" / "banded_0003.jpg").unlink()  # of "val", which nobody reads
    with pytest.raises(DataError, match="1 are missing and 1 cannot be read"):
        find_images(config("xtail", damaged, shots=2)).stream(transforms)


def test_verify_none_trusts_the_files(damaged, config, transforms):
    find_images(config("xtail", damaged, shots=2, verify="none")).stream(transforms)


def test_long_lists_go_to_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [tmp_path / f"{i}.jpg" for i in range(25)]
    with pytest.raises(DataError, match="of 25 images 25 are missing .*(.|\n)*and 15 more; .*bad_images.txt"):
        check_images([*paths, *paths], Decoder(2), "headers")
    assert (tmp_path / "bad_images.txt").read_text().splitlines() == [f"{path}: missing" for path in paths]


# ---- options


def test_options_are_checked_first(tmp_path, config):
    from fastlora.continual.benchmarks import benchmark
    from fastlora.continual.config import RunConfig

    for name, message in (("xtail", "say where with --data.root DIR"), ("folders", "say where")):
        with pytest.raises(UsageError, match=message):
            check_options(benchmark(name).completed(RunConfig(benchmark=name)))
    with pytest.raises(UsageError, match="which is no directory"):
        check_options(config("xtail", tmp_path / "absent"))
    with pytest.raises(UsageError, match="needs data.tasks"):
        check_options(config("folders", tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_dir": " "}, "data.cache_dir is ' '; it must be a path"),
        ({"cache_dir": 3}, "data.cache_dir is 3; it must be a path"),
        ({"cache_dir_gb": 0}, r"data.cache_dir_gb is 0; it must be a finite number > 0\. Give gigabytes"),
        ({"cache_dir_gb": float("inf")}, "data.cache_dir_gb is inf; it must be a finite number"),
        ({"cache_crops": "some"}, "data.cache_crops is 'some'; it must be true or false"),
    ],
)
def test_options_of_the_cache_on_disk(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


def test_a_place_for_the_cache_is_looked_at_first(tmp_path, config):
    with pytest.raises(UsageError, match="no cache to keep crops in"):
        check_options(config("xtail", tmp_path, cache_crops=True))
    with pytest.raises(UsageError, match="which holds 'file' and is no cache of images"):
        (tmp_path / "file").write_bytes(b"")
        find_images(config("xtail", tmp_path, cache_dir=str(tmp_path)))
