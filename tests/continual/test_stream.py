"""Task and TaskStream: validation, and the rule that earlier training data is gone."""

import gc
import weakref

import pytest
import torch

from fastlora.continual.stream import InMemoryImages, Reference, Task, TaskStream


def images(n=4, classes=2):
    return InMemoryImages(torch.randn(n, 3, 8, 8), torch.arange(n) % classes)


def task(name="a", **changes):
    fields = {"classes": ("cat", "dog"), "templates": ("a {}.",), "train": images(), "test": images()} | changes
    return Task(name, **fields)


def test_images_index_singly_and_by_batch():
    data = images(6)
    image, label = data[5]
    assert image.shape == (3, 8, 8) and label == 1 and isinstance(label, int) and len(data) == 6
    batch = torch.tensor([0, 3])
    assert data.images[batch].shape == (2, 3, 8, 8) and data.labels[batch].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("pixels", "labels", "error", "text"),
    [
        (torch.zeros(2, 3, 8, 8), [0, 1], TypeError, "labels is a list; it must be a tensor"),
        (torch.zeros(2, 3, 8, 8).half(), torch.zeros(2).long(), TypeError, r"images has dtype torch.float16.*float32"),
        (torch.zeros(2, 3, 8, 8), torch.zeros(2), TypeError, r"labels has dtype torch.float32.*int64"),
        (torch.zeros(3, 8, 8), torch.zeros(3).long(), ValueError, r"\[3, 8, 8\]; it must be \[n, C, H, W\]"),
        (torch.zeros(2, 3, 8, 8), torch.zeros(3).long(), ValueError, r"\[3\]; with 2 images it must be \[2\]"),
        (torch.zeros(2, 3, 8, 8), torch.tensor([0, -1]), ValueError, "labels holds -1; labels count from 0"),
    ],
)
def test_images_refuse(pixels, labels, error, text):
    with pytest.raises(error, match=text):
        InMemoryImages(pixels, labels)


def test_task_stores_tuples_and_is_frozen():
    made = task(classes=["cat", "dog"], templates=["a {}."])
    assert made.classes == ("cat", "dog") and made.templates == ("a {}.",)
    with pytest.raises(AttributeError):
        made.name = "b"


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"classes": "cat"}, TypeError, "classes of task 'a' is 'cat'; it must be a sequence of strings"),
        ({"classes": ()}, ValueError, "classes of task 'a' is empty"),
        ({"classes": ("cat", "cat")}, ValueError, r"repeat \['cat'\]; names must be distinct"),
        ({"classes": ("cat", " ")}, ValueError, "blank entry"),
        ({"templates": "a {}."}, TypeError, "templates of task 'a' is 'a {}.'"),
        ({"templates": ("a cat.",)}, ValueError, "has 0 fields; it must have exactly one {}"),
        ({"templates": ("{} {}",)}, ValueError, "has 2 fields"),
        ({"templates": ("a {name}.",)}, ValueError, "exactly one {}"),
        ({"templates": ("a {",)}, ValueError, "is no format string"),
        ({"test": images(0)}, ValueError, "test of task 'a' is empty"),
        ({"test": images(3, 3)}, ValueError, "holds label 2; with 2 classes labels are 0 to 1"),
        ({"train": images(3, 3)}, ValueError, "train of task 'a' holds label 2"),
        ({"test": iter(())}, TypeError, "must be a map-style Dataset"),
    ],
)
def test_task_refuses(changes, error, text):
    with pytest.raises(error, match=text):
        task(**changes)


def test_task_refuses_a_blank_name():
    with pytest.raises(ValueError, match="task name is ' '"):
        task(" ")


def test_opening_a_task_closes_the_earlier_ones_for_good():
    data = [images() for _ in range(3)]
    stream = TaskStream("s", [task(name, train=train) for name, train in zip("abc", data, strict=True)])
    assert stream.open_task(0) is data[0]
    assert stream.open_task(0) is data[0]  # the current one may be opened again
    assert stream.open_task(1) is data[1]
    with pytest.raises(RuntimeError, match=r"task 0 \('a'\) is closed: task 1 has been opened.*Build the stream anew"):
        stream.open_task(0)
    assert stream.open_task(2) is data[2]
    with pytest.raises(RuntimeError, match=r"task 1 \('b'\) is closed"):
        stream.open_task(1)
    assert all(len(one.test) == 4 for one in stream.tasks)


def test_a_resumed_run_may_skip_ahead_but_not_return():
    stream = TaskStream("s", [task(name) for name in "abc"])
    stream.open_task(2)
    for closed in (0, 1):
        with pytest.raises(RuntimeError, match="is closed"):
            stream.open_task(closed)


def test_closed_training_data_is_released():
    first = images()
    released = weakref.ref(first)
    stream = TaskStream("s", [task("a", train=first), task("b")])
    del first
    gc.collect()
    assert released() is not None
    stream.open_task(1)
    gc.collect()
    assert released() is None


def test_training_data_is_not_reachable_through_the_tasks():
    stream = TaskStream("s", [task("a"), task("b")], held_out=task("h", train=None))
    assert [one.train for one in stream.tasks] == [None, None]
    assert len(stream) == 2 and stream.held_out.name == "h"


def test_stream_refuses():
    with pytest.raises(ValueError, match="stream 's' has no tasks"):
        TaskStream("s", [])
    with pytest.raises(ValueError, match=r"repeats the task names \['a'\]"):
        TaskStream("s", [task("a"), task("a")])
    with pytest.raises(TypeError, match="holds a str; it must hold Task objects"):
        TaskStream("s", [task("a")], held_out="h")
    stream = TaskStream("s", [task("a", train=None)])
    with pytest.raises(ValueError, match="has no training data"):
        stream.open_task(0)
    for index in (1, -1):
        with pytest.raises(IndexError, match=f"task {index} was asked for; 's' has tasks 0 to 0"):
            stream.open_task(index)


def test_duplicate_classes_are_listed():
    stream = TaskStream("s", [task("a"), task("b", classes=("dog", "fox"))])
    assert stream.duplicate_classes() == {"dog": ("a", "b")}


def test_everything_at_once_or_task_by_task(stream):
    sizes = [len(data) for data in stream.open_all()]
    assert sizes == [24, 32, 16]
    for index in range(3):
        with pytest.raises(RuntimeError, match="is closed"):
            stream.open_task(index)


def test_all_tasks_are_not_handed_out_once_one_was_opened(stream):
    stream.open_task(0)
    with pytest.raises(RuntimeError, match="at once or task by task. Build the stream anew"):
        stream.open_all()


def test_reference_needs_texts(stream):
    with pytest.raises(ValueError, match="texts of the reference data is empty"):
        Reference(stream.open_task(0), ())
