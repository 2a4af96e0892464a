"""The streams that the benchmarks are made of."""

import pytest
import torch

from fastlora.continual.config import RunConfig
from fastlora.continual.datasets import find_images, prompts
from fastlora.continual.datasets.catalogue import SOURCES
from fastlora.continual.datasets.protocols import MTIL_ORDERS, XTAIL_ORDER
from fastlora.continual.manifest import describe, differences, hashes, training, union_ceiling


def stream_of(config, transforms, name, root, **options):
    return find_images(config(name, root, **options)).stream(transforms)


@pytest.mark.parametrize("order", ["I", "II"])
def test_mtil(root, order, config, transforms):
    stream = stream_of(config, transforms, "mtil", root, order=order)
    assert tuple(task.name for task in stream.tasks) == MTIL_ORDERS[order]
    assert sum(len(task.classes) for task in stream.tasks) == 1201
    food = stream.tasks[MTIL_ORDERS[order].index("Food")]
    assert food.templates == ("a photo of a {}, a type of food.",) and "french onion soup" in food.classes
    data = stream.open_task(0)
    assert len(data) == {"I": 300, "II": 588}[order] and data.training and not food.test.training
    images, labels = data.load([0, 5])
    assert images.shape == (2, 3, 16, 16) and torch.isfinite(images).all() and labels.dtype == torch.int64
    assert all(isinstance(task.test.labels, torch.Tensor) for task in stream.tasks)


def test_mtil_with_shots(roots, config, transforms):
    stream = stream_of(config, transforms, "mtil", roots["coop"], shots=2)
    for index, task in enumerate(stream.tasks):
        assert len(stream.train_files[index]) == 2 * len(task.classes)
        assert len(set(stream.train_files[index])) == 2 * len(task.classes)


@pytest.mark.parametrize("convention", ["per-dataset", "single"])
def test_xtail(root, convention, config, transforms):
    stream = stream_of(config, transforms, "xtail", root, shots=2, prompts=convention)
    assert tuple(task.name for task in stream.tasks) == XTAIL_ORDER
    assert sum(len(task.classes) for task in stream.tasks) == 1100
    expected = [("a photo of a {}.",)] * 10 if convention == "single" else [prompts.XTAIL[n] for n in XTAIL_ORDER]
    assert [task.templates for task in stream.tasks] == expected
    assert len(stream.open_task(9)) == 2 * 397


def test_every_data_set_has_prompts():
    assert set(prompts.MTIL) == set(SOURCES) and set(prompts.XTAIL) == set(XTAIL_ORDER)
    assert len(prompts.MTIL["Caltech101"]) == 34 and len(prompts.MTIL["CIFAR100"]) == 18
    assert (
        prompts.MTIL["Caltech101"][10] == "a {} in a video game." and prompts.MTIL["Caltech101"][30] == "art of the {}."
    )
    assert prompts.MTIL["DTD"][4] == "a photo of the {} texture."


def test_defaults_are_the_published_ones():
    from fastlora.continual.benchmarks import benchmark

    xtail = benchmark("xtail").completed(RunConfig(benchmark="xtail"))
    assert (xtail.data.shots, xtail.data.prompts) == (16, "per-dataset")
    assert (xtail.model, xtail.pretrained) == ("ViT-B-16", "openai")
    mtil = benchmark("mtil").completed(RunConfig(benchmark="mtil"))
    assert (mtil.data.shots, mtil.data.order) == (0, "I")


def test_layout_and_seed(roots, config, transforms):
    """The layout decides nothing; the seed decides the training images and no test image."""
    facts = []
    for layout, seed in (("coop", 0), ("torchvision", 0), ("coop", 1)):
        stream = stream_of(config, transforms, "xtail", roots[layout], shots=2, seed=seed)
        facts.append(([hashes(task) for task in stream.tasks], training(stream)))
    assert facts[0] == facts[1]
    assert facts[0][0] == facts[2][0] and facts[0][1] != facts[2][1]


def test_single_prompts_have_a_ceiling(roots, config, transforms):
    """Caltech101's pizza takes Food's, its lotus and sunflower would take those of Flowers had they these names here."""
    single = stream_of(config, transforms, "xtail", roots["coop"], shots=2, prompts="single")
    assert single.duplicate_classes() == {"pizza": ("Caltech101", "Food")}
    ceiling = union_ceiling(single)
    assert ceiling["Food"] == pytest.approx(100 * 100 / 101) and ceiling["Caltech101"] == 100
    assert ceiling["mean"] == pytest.approx(100 - 100 / 101 / 10)
    own = stream_of(config, transforms, "xtail", roots["coop"], shots=2)
    assert own.duplicate_classes() == single.duplicate_classes()  # the names are the same, the prompts are not
    assert set(union_ceiling(own).values()) == {100.0}


def test_names_shared_in_mtil(roots, config, transforms):
    stream = stream_of(config, transforms, "mtil", roots["coop"])
    assert set(stream.duplicate_classes()) == {"lotus", "pizza", "sunflower"}
    assert stream.duplicate_classes()["sunflower"] == ("Caltech101", "Flowers")


def test_manifest_holds_what_decides_the_data(roots, config, transforms, clip):
    with pytest.warns(UserWarning, match="DTD: 47 of 47 classes have fewer than 5 .* with replacement"):
        stream = stream_of(config, transforms, "xtail", roots["coop"], shots=5)
    facts = describe(clip, stream, torch.device("cpu"))
    dtd = facts["training"]["DTD"]
    assert dtd["images"] == 5 * 47 and dtd["distinct"] < dtd["images"]  # three images a class: with replacement
    assert facts["class_names"]["DTD"][:2] == ["banded", "blotchy"] and facts["templates"]["DTD"] == ["{} texture."]
    assert len(facts["hashes"]["DTD"]["test_files_sha256"]) == 64
    assert differences(facts, stream, with_training=True) == []
    assert facts["duplicate_classes"] == {"pizza": ["Caltech101", "Food"]} and facts["union_ceiling"]["mean"] == 100


def test_reference_images_and_captions(roots, tmp_path, config, transforms):
    from continual.datasets import layouts

    for number, name in enumerate(("tench", "great_white_shark")):
        layouts.put(tmp_path / "reference" / name / "a.jpeg", number)
    stream = stream_of(config, transforms, "mtil", roots["coop"], reference=str(tmp_path / "reference"))
    assert len(stream.reference.images) == 2 and not stream.reference.images.training
    assert stream.reference.texts == ("a photo of a great white shark.", "a photo of a tench.")
    texts_alone = stream_of(config, transforms, "mtil", roots["coop"]).reference
    assert texts_alone.images is None and len(texts_alone.texts) == 1000 and "a photo of a tench." in texts_alone.texts
    (tmp_path / "captions.txt").write_text("a dog runs\n\ntwo birds on a wire\n")
    options = {"reference": str(tmp_path / "reference"), "captions": str(tmp_path / "captions.txt")}
    texts_alone = stream_of(config, transforms, "mtil", roots["coop"], captions=options["captions"]).reference
    assert texts_alone.images is None and texts_alone.texts == ("a dog runs", "two birds on a wire")
    stream = stream_of(config, transforms, "mtil", roots["coop"], **options)
    assert stream.reference.texts == ("a dog runs", "two birds on a wire")
    (tmp_path / "captions.txt").write_text("\n")
    with pytest.raises(ValueError, match="captions.txt gives no texts"):
        stream_of(config, transforms, "mtil", roots["coop"], **options)
    (tmp_path / "empty").mkdir()
    for folder, message in (("empty", "has no images"), ("absent", "is no directory")):
        with pytest.raises(ValueError, match=message):
            stream_of(config, transforms, "mtil", roots["coop"], reference=str(tmp_path / folder))
