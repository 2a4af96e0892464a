"""Reference data: of the pretraining world, of no task, and rendered only where it is used."""

import pytest
import torch

from fastlora.continual.demo import demo_stream, open_clip_demo, reference
from fastlora.continual.manifest import reference_hashes


@pytest.fixture(scope="module")
def stream():
    return demo_stream(seed=0)


def pixels(data):
    return {image.numpy().tobytes() for image, _ in (data[i] for i in range(len(data)))}


def test_sizes_and_form(stream):
    images, texts = stream.reference.images, stream.reference.texts
    assert (len(images), len(texts)) == (reference.IMAGES, reference.TEXTS) == (512, 512)
    image, label = images[3]
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32 and label == 0
    assert len(set(texts)) > 300  # partial captions repeat


def test_same_for_every_seed(stream):
    other = demo_stream(seed=3)
    assert other.reference.texts == stream.reference.texts
    assert torch.equal(other.reference.images[7][0], stream.reference.images[7][0])


def test_captions_are_in_the_vocabulary(stream):
    tokenizer = open_clip_demo().tokenizer
    assert len(tokenizer(list(stream.reference.texts))) == 512  # raises on an unknown word


def test_no_picture_is_one_of_a_task_or_of_the_held_out_set(stream):
    own = pixels(stream.reference.images)
    assert len(own) > 0.99 * reference.IMAGES
    tests = [task.test for task in (*stream.tasks, stream.held_out)]
    validation = demo_stream(seed=0, split="validation")
    tests += [task.test for task in (*validation.tasks, validation.held_out)]
    fresh = demo_stream(seed=0)
    tests += [fresh.open_task(index) for index in range(len(fresh))]
    assert not any(own & pixels(data) for data in tests)


def test_tasks_do_not_depend_on_it(monkeypatch, stream):
    monkeypatch.setattr(reference, "IMAGES", 3)
    fewer = demo_stream(seed=0)
    assert len(fewer.reference.images) == 3
    assert torch.equal(fewer.held_out.test.images, stream.held_out.test.images)
    assert torch.equal(fewer.open_task(0).images, demo_stream(seed=0).open_task(0).images)


def test_nothing_is_rendered_before_a_picture_is_asked_for(monkeypatch):
    calls, render = [], reference.render
    monkeypatch.setattr(reference, "render", lambda *args: calls.append(1) or render(*args))
    fresh = demo_stream(seed=0)
    assert reference_hashes(fresh.reference)["images"] == 512 and not calls
    assert torch.equal(fresh.reference.images[0][0], fresh.reference.images[0][0]) and calls == [1]
