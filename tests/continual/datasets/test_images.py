"""Decoding, crops and the caches, against open_clip's own transforms."""

import dataclasses
import os
import shutil

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from fastlora.continual.batches import batches, gather, generator_for, in_order
from fastlora.continual.datasets.disk_cache import DiskCache, entry_bytes
from fastlora.continual.datasets.images import Decoder, LazyImages
from fastlora.continual.datasets.split import Images
from fastlora.continual.datasets.transforms import Transforms, random_box

SIZES = ((40, 30), (16, 16), (9, 50), (200, 17), (33, 70), (16, 31))


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    for number, (width, height) in enumerate(SIZES):
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        image.convert("L" if number == 1 else "RGB").save(tmp_path / f"{number}.png")
    return tmp_path


@pytest.fixture
def make(folder, transforms):
    def make(training=False, workers=1, cache=0, pixels=None):
        names = tuple(f"{number}.png" for number in range(len(SIZES)))
        images = Images(names, (0, 1, 2, 0, 1, 2), pixels)
        return LazyImages(folder, images, transforms, Decoder(workers, cache), training=training)

    return make


def test_test_images_are_open_clips_bit_for_bit(make, folder, transform_pair):
    data = make()
    images, labels = data.load(range(len(data)))
    assert images.dtype == torch.float32 and images.shape == (6, 3, 16, 16) and labels.tolist() == [0, 1, 2, 0, 1, 2]
    for number, image in enumerate(images):
        expected = transform_pair[1](Image.open(folder / f"{number}.png").convert("RGB"))
        assert torch.equal(image, expected)
    assert torch.equal(data[4][0], images[4]) and data[4][1] == 1
    with pytest.raises(IndexError):
        data[6]


def test_training_images_are_open_clips_with_the_same_draws(make, folder, transform_pair):
    images, _ = make(training=True).load([0, 3, 0], torch.Generator().manual_seed(7))
    torch.manual_seed(7)
    for number, image in zip((0, 3, 0), images):
        assert torch.equal(image, transform_pair[0](Image.open(folder / f"{number}.png").convert("RGB")))
    assert not torch.equal(images[0], images[2])  # each draw is a new one


@pytest.mark.parametrize("shape", [(30, 40), (500, 20), (20, 500), (1, 1), (3, 64)])
def test_boxes_are_torchvisions(shape):
    for scale in ((0.9, 1.0), (0.08, 1.0)):
        for seed in range(40):
            torch.manual_seed(seed)
            expected = RandomResizedCrop.get_params(torch.empty(3, *shape), list(scale), [3 / 4, 4 / 3])
            box = random_box(*shape, scale, (3 / 4, 4 / 3), torch.Generator().manual_seed(seed))
            assert box == tuple(expected)


def test_threads_and_the_global_generator_change_nothing(make):
    """Same batches with one thread and with four, whatever is drawn beside them."""
    expected = []
    for workers in (1, 4):
        stream = batches(make(training=True, workers=workers), 4, seed=3, task=2)
        got = []
        for number in range(5):
            torch.manual_seed(number * workers)
            got.append(next(stream))
        expected = expected or got
        for (images, labels), (others, other_labels) in zip(got, expected):
            assert torch.equal(images, others) and torch.equal(labels, other_labels)
        assert [len(labels) for _, labels in got] == [4, 2, 4, 2, 4]
    first, second = (next(batches(make(training=True), 4, seed=seed, task=2))[0] for seed in (3, 4))
    assert not torch.equal(first, second)


def test_drawing_leaves_the_global_generator_alone(make):
    before = torch.get_rng_state()
    make(training=True).load([0, 1, 2], torch.Generator().manual_seed(0))
    make(training=True).load([0, 1, 2])
    assert torch.equal(before, torch.get_rng_state())


def test_a_batch_is_a_function_of_its_place(make):
    """What a run that is resumed in an epoch needs: crops do not depend on the batches before."""
    data = make(training=True)
    stream = batches(data, 4, seed=0, task=1)
    second = [next(stream), next(stream)][1]
    from fastlora.continual.batches import epoch_order

    again = gather(data, epoch_order(6, 0, 1, 0)[4:], generator_for(0, "crops", 1, 0, 1))
    assert torch.equal(second[0], again[0]) and torch.equal(second[1], again[1])


def test_a_part_of_a_batch_has_the_crops_of_the_whole(make, folder):
    """Of the images before it the headers are read, those behind it are left alone."""
    data, indices = make(training=True), [3, 0, 4, 1, 5]
    images, labels = data.load(indices, torch.Generator().manual_seed(7))
    path = folder / "0.png"
    path.write_bytes(path.read_bytes()[:60])
    (folder / "5.png").unlink()
    found = data.load(indices, torch.Generator().manual_seed(7), slice(2, 4))
    assert torch.equal(found[0], images[2:4]) and torch.equal(found[1], labels[2:4])
    with pytest.raises(ValueError, match=r"[05].png cannot be decoded"):
        data.load(indices, torch.Generator().manual_seed(7))
    plain = make()
    assert torch.equal(plain.load([1, 2, 3], None, slice(1, 2))[0], plain.load([2])[0])


def test_training_images_without_a_generator_are_always_the_same(make):
    data = make(training=True)
    assert torch.equal(data[3][0], data.load([5, 3])[0][1]) and torch.equal(data[3][0], data[3][0])


def test_cache_gives_the_same_and_reads_no_file_again(make, folder):
    size = 3 * 16 * 16
    data, plain = make(cache=4 * size), make()
    expected = torch.cat([images for images, _ in in_order(plain, 4)])
    for _ in range(2):
        assert torch.equal(torch.cat([images for images, _ in in_order(data, 4)]), expected)
    for number in range(4):  # as many as there was room for
        (folder / f"{number}.png").unlink()
    assert torch.equal(data.load(range(6))[0], expected)
    (folder / "4.png").unlink()
    with pytest.raises(ValueError, match="4.png cannot be decoded"):
        data.load([4])


def test_cache_is_shared_and_bounded(make):
    size = 3 * 16 * 16
    decoder = Decoder(1, 2 * size + 1)
    assert decoder.reserve(size) and decoder.reserve(size) and not decoder.reserve(size) and decoder.reserve(1)
    assert not decoder.reserve(1)


def test_grey_pixels_become_rgb(make, transforms):
    pixels = np.arange(6 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(6, 28, 28)
    images, _ = make(pixels=pixels).load([2])
    raw = images[0] * torch.tensor(transforms.std)[:, None, None] + torch.tensor(transforms.mean)[:, None, None]
    assert torch.allclose(raw[0], raw[2], atol=1e-6) and images.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("damage", [b"no image", b""])
def test_a_damaged_image_is_named(make, folder, damage):
    (folder / "2.png").write_bytes(damage)
    for training in (False, True):
        with pytest.raises(ValueError, match=r"2.png cannot be decoded \(.*verify decode finds all"):
            make(training=training).load([0, 2])


def test_a_truncated_image_is_named_and_the_stream_stops(make, folder):
    content = (folder / "0.png").read_bytes()
    (folder / "0.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="0.png cannot be decoded"):
        list(in_order(make(), 2))


# ---- the cache on disk


@pytest.fixture
def cached(folder, transforms, tmp_path):
    """cached(training, crops=True, ...): over one cache, as another run would be."""

    def make(training=False, crops=True, where=folder, how=transforms, workers=2, pixels=None):
        images = Images(tuple(f"{number}.png" for number in range(len(SIZES))), (0, 1, 2, 0, 1, 2), pixels)
        disk = DiskCache(tmp_path / "cache", 10**8)
        return LazyImages(where, images, how, Decoder(workers, 0, disk, crops), training=training)

    return make


@pytest.fixture
def kept(tmp_path):
    """Names of the entries on disk."""
    return lambda: {path.name for path in (tmp_path / "cache").glob("??/*")}


@pytest.fixture
def no_decoder(monkeypatch):
    """From here on nothing is cut or resized."""

    def forbid():
        for name in ("fitted", "cut"):
            monkeypatch.setattr(Transforms, name, lambda *arguments: pytest.fail("an image was prepared again"))

    return forbid


def two_epochs(data, workers=1):
    stream = batches(data, 4, seed=3, task=2)
    return [next(stream)[0] for _ in range(4)]


def test_tests_without_with_and_from_a_cache_on_disk(make, cached, kept, no_decoder):
    expected = make().load(range(6))[0]
    assert torch.equal(cached().load(range(6))[0], expected) and len(kept()) == 6
    no_decoder()
    assert torch.equal(cached().load(range(6))[0], expected)
    assert torch.equal(torch.cat([images for images, _ in in_order(cached(workers=1), 4)]), expected)


def test_crops_without_with_and_from_a_cache_on_disk(make, cached, kept, no_decoder):
    expected = two_epochs(make(training=True))
    for _ in range(2):
        assert all(map(torch.equal, two_epochs(cached(training=True)), expected))
        assert len(kept()) > 6  # more than images: each epoch has crops of its own
        no_decoder()


def test_crops_are_kept_where_that_is_asked_for(make, cached, kept):
    data = cached(training=True, crops=False)
    assert all(map(torch.equal, two_epochs(data), two_epochs(make(training=True))))
    assert not kept() and data.disk_bytes == 0
    assert cached().disk_bytes == cached(training=True).disk_bytes == entry_bytes(16, 16)


def test_another_image_in_a_file_is_another_image(cached, make, folder, kept):
    """Of the same size, with the same times."""
    before = cached().load([0, 3])[0]
    status = (folder / "0.png").stat()
    content = bytearray((folder / "0.png").read_bytes())
    Image.new("RGB", SIZES[0], (9, 99, 199)).save(folder / "0.png", compress_level=0)
    with open(folder / "0.png", "r+b") as file:
        file.truncate(max(len(content), file.seek(0, 2)))
    os.utime(folder / "0.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    after = cached().load([0, 3])[0]
    assert not torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])
    assert torch.equal(after, make().load([0, 3])[0]) and len(kept()) == 3


def test_two_data_sets_share_an_image(cached, folder, kept, tmp_path):
    (tmp_path / "other").mkdir()
    for number in range(6):
        shutil.copy(folder / "3.png", tmp_path / "other" / f"{number}.png")
    expected = cached().load([3])[0]
    assert len(kept()) == 1
    assert torch.equal(cached(where=tmp_path / "other").load([2, 4])[0], expected.expand(2, -1, -1, -1))
    assert len(kept()) == 1


OTHERS = {
    "size": {"image_size": 24},
    "interpolation": {"image_size": 16, "interpolation": "bilinear"},
    "longest": {"image_size": 16, "resize_mode": "longest"},
    "fill": {"image_size": 16, "resize_mode": "longest", "fill_color": 200},
    "squash": {"image_size": 16, "resize_mode": "squash"},
}


def test_other_transforms_have_entries_of_their_own(cached, kept, folder):
    pairs = [[image_transform(is_train=side, **options) for side in (True, False)] for options in OTHERS.values()]
    recipes = {Transforms.of(*pair).recipe() for pair in pairs}
    assert len(recipes) == len(pairs)
    for count, pair in enumerate(pairs, 1):
        images = cached(how=Transforms.of(*pair)).load([0, 3])[0]
        assert len(kept()) == 2 * count
        for number, image in zip((0, 3), images):
            assert torch.equal(image, pair[1](Image.open(folder / f"{number}.png").convert("RGB")))


def test_what_decodes_is_part_of_the_recipe(transforms, transform_pair, monkeypatch):
    assert Transforms.of(*transform_pair).recipe() == transforms.recipe()
    recipes = {transforms.recipe()}
    for name, value in (
        ("PIL.__version__", "0"),
        ("torchvision.__version__", "0"),
        ("PIL.features.version", lambda name: "0"),
        ("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(name, value)
            recipes.add(transforms.recipe())
    assert len(recipes) == 5


def test_a_transform_that_does_not_tell_what_it_is_matches_no_other_run(transforms):
    own = dataclasses.replace(transforms, fit=lambda image: image.resize((16, 16)))
    assert own.recipe() != own.recipe()


def test_a_tiff_that_is_turned_while_it_is_decoded(cached, folder, transform_pair):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(folder / "3.png").crop((0, 0, 60, 17))
    image.save(folder / "3.png", "TIFF", exif=exif)
    decoded = Image.open(folder / "3.png").convert("RGB")
    assert decoded.size == (17, 60)
    for _ in range(2):
        images, _ = cached(training=True).load([3], torch.Generator().manual_seed(7))
        torch.manual_seed(7)
        assert torch.equal(images[0], transform_pair[0](decoded))


def test_arrays_are_not_stored(cached, kept):
    data = cached(pixels=np.zeros((6, 28, 28), np.uint8))
    assert data.load(range(6))[0].shape == (6, 3, 16, 16) and not kept() and data.disk_bytes == 0


@pytest.mark.parametrize("training", [False, True])
def test_an_image_that_is_gone_or_damaged_is_named_and_not_stored(cached, folder, kept, training):
    data = cached(training=training)
    data.load([0, 2])
    before = kept()
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:200])
    with pytest.raises(ValueError, match="2.png cannot be decoded"):
        data.load([0, 2])
    (folder / "2.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"2.png cannot be decoded \(cannot identify the file\)"):
        data.load([0, 2])
    (folder / "2.png").unlink()
    with pytest.raises(ValueError, match="2.png cannot be decoded .*No such file"):
        data.load([0, 2])
    assert kept() == before
