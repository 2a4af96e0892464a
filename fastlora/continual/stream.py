"""Sequences of classification tasks, exemplar-free by construction.

A stream hands out the training data of one task at a time and forgets it when a later task is opened. Test data stays
available: every task is evaluated after every task.
"""

from __future__ import annotations

import dataclasses
import string
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset


class InMemoryImages(Dataset[tuple[torch.Tensor, int]]):
    """Preprocessed images held as one tensor, so that a batch is one indexing operation.

    Args:
        images: [n, C, H, W] float32.
        labels: [n] int64, not negative.
    Raises:
        TypeError: not tensors, or other dtypes.
        ValueError: shapes that do not fit, or a negative label.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        for name, value, dtype in (("images", images, torch.float32), ("labels", labels, torch.int64)):
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"{name} is a {type(value).__name__}; it must be a tensor. Use torch.as_tensor.")
            if value.dtype != dtype:
                raise TypeError(f"{name} has dtype {value.dtype}; it must be {dtype}. Convert with {name}.to({dtype}).")
        if images.ndim != 4:
            raise ValueError(
                f"images has shape {list(images.shape)}; it must be [n, C, H, W]. Stack single images first."
            )
        if labels.shape != images.shape[:1]:
            raise ValueError(
                f"labels has shape {list(labels.shape)}; with {len(images)} images it must be [{len(images)}]. "
                "Give one label per image."
            )
        if len(labels) and int(labels.min()) < 0:
            raise ValueError(f"labels holds {int(labels.min())}; labels count from 0. Leave unlabelled images out.")
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], int(self.labels[index])

    def __repr__(self) -> str:
        return f"InMemoryImages({len(self)} images of {list(self.images.shape[1:])})"


def _texts(value: Sequence[str], what: str) -> tuple[str, ...]:
    if isinstance(value, str) or not all(isinstance(item, str) for item in value):
        raise TypeError(
            f"{what} is {value!r}; it must be a sequence of strings. Write a tuple, also for a single entry."
        )
    value = tuple(value)
    if not value:
        raise ValueError(f"{what} is empty; at least one entry is needed. Leave the task out if it has none.")
    if not all(item.strip() for item in value):
        raise ValueError(f"{what} holds a blank entry: {value!r}; every entry must have text. Remove it.")
    return value


def _check_template(template: str) -> None:
    try:
        fields = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(
            f"template {template!r} is no format string ({error}); write one {{}} for the class name."
        ) from None
    if fields != [("", "", None)]:
        raise ValueError(
            f"template {template!r} has {len(fields)} fields; it must have exactly one {{}}, for the class name. "
            'Write it like "a photo of a {}."'
        )


class MapStyle(Protocol):
    """A map-style data set, such as a subclass of torch's Dataset, which itself promises no length."""

    def __getitem__(self, index: int, /) -> Any: ...

    def __len__(self) -> int: ...


def _check_data(data: MapStyle, what: str, classes: int) -> None:
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        raise TypeError(
            f"{what} is a {type(data).__name__}; it must be a map-style Dataset. Give it __getitem__ and __len__."
        )
    if len(data) == 0:
        raise ValueError(f"{what} is empty; at least one image is needed. Check where it was loaded from.")
    labels = getattr(data, "labels", None)
    if isinstance(labels, torch.Tensor) and int(labels.max()) >= classes:
        raise ValueError(
            f"{what} holds label {int(labels.max())}; with {classes} classes labels are 0 to {classes - 1}. "
            "Number the labels within their own task."
        )


@dataclasses.dataclass(frozen=True)
class Task:
    """One classification task.

    Args:
        name: unique within a stream.
        classes: class names in the order of the labels, distinct.
        templates: format strings with one {} for the class name; the first is for training, all are for evaluation.
        train: map-style dataset of (float image tensor [3, H, W], already preprocessed; int label), or None.
        test: the same, for evaluation.
    Raises:
        TypeError, ValueError: what was given, what is accepted, what to do.
    """

    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    train: MapStyle | None
    test: MapStyle

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise ValueError(f"task name is {self.name!r}; it must be a text that is not blank. Name the task.")
        classes = _texts(self.classes, f"classes of task {self.name!r}")
        repeated = sorted({name for name in classes if classes.count(name) > 1})
        if repeated:
            raise ValueError(
                f"classes of task {self.name!r} repeat {repeated}; names must be distinct. Merge or rename them."
            )
        templates = _texts(self.templates, f"templates of task {self.name!r}")
        for template in templates:
            _check_template(template)
        if self.train is not None:
            _check_data(self.train, f"train of task {self.name!r}", len(classes))
        _check_data(self.test, f"test of task {self.name!r}", len(classes))
        object.__setattr__(self, "classes", classes)
        object.__setattr__(self, "templates", templates)


@dataclasses.dataclass(frozen=True)
class Reference:
    """Images and texts of no task, for methods that hold a model to what it said of them.

    Args:
        images: map-style dataset of (float image tensor [3, H, W], already preprocessed; int, ignored); None for texts
            alone.
        texts: sentences, at least one.
    Raises:
        TypeError, ValueError: what was given, what is accepted, what to do.
    """

    images: MapStyle | None
    texts: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images is not None:
            _check_data(self.images, "images of the reference data", classes=sys.maxsize)
        object.__setattr__(self, "texts", _texts(self.texts, "texts of the reference data"))


@dataclasses.dataclass(frozen=True)
class TaskStream:
    """Tasks in the order in which they arrive, and a held-out task that is only ever evaluated.

    The stream takes the training data out of its tasks: `tasks[i].train` is None, `open_task` is the only way to it.

    Args:
        name: name of the benchmark.
        tasks: at least one, with distinct names.
        held_out: evaluated after every task to measure what pretraining knew; None for none.
        reference: for methods that distil on data of no task; None for none.
    """

    name: str
    tasks: Sequence[Task]
    held_out: Task | None = None
    reference: Reference | None = None
    # names of the training images, where a data set tells them in `files`; kept when the images are given up
    train_files: tuple[tuple[str, ...] | None, ...] = dataclasses.field(init=False, repr=False, compare=False)
    # state, not value: which training data is still there
    _train: list[MapStyle | None] = dataclasses.field(init=False, repr=False, compare=False)
    _opened: int | None = dataclasses.field(default=None, init=False, repr=False, compare=False)  # newest opened task

    def __post_init__(self) -> None:
        given = tuple(self.tasks)
        if not given:
            raise ValueError(f"stream {self.name!r} has no tasks; at least one is needed. Give a sequence of Task.")
        for task in (*given, *(() if self.held_out is None else (self.held_out,))):
            if not isinstance(task, Task):
                raise TypeError(
                    f"stream {self.name!r} holds a {type(task).__name__}; it must hold Task objects. Build Task(...)."
                )
        names = [task.name for task in given]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(
                f"stream {self.name!r} repeats the task names {repeated}; names must be distinct. Rename them."
            )
        object.__setattr__(self, "train_files", tuple(getattr(task.train, "files", None) for task in given))
        object.__setattr__(self, "_train", [task.train for task in given])
        object.__setattr__(self, "tasks", tuple(dataclasses.replace(task, train=None) for task in given))

    def __len__(self) -> int:
        return len(self.tasks)

    def open_task(self, index: int) -> MapStyle:
        """Training data of a task; the training data of all earlier tasks is given up for good.

        Args:
            index: of the task, counted from 0.
        Returns:
            Its map-style dataset.
        Raises:
            IndexError: no such task.
            RuntimeError: a later task has been opened before.
            ValueError: the task has no training data.
        """
        if not 0 <= index < len(self.tasks):
            raise IndexError(
                f"task {index} was asked for; {self.name!r} has tasks 0 to {len(self.tasks) - 1}. Stay within."
            )
        name = self.tasks[index].name
        if self._opened is not None and index < self._opened:
            raise RuntimeError(
                f"task {index} ({name!r}) is closed: task {self._opened} has been opened, and a stream keeps no "
                "training data of earlier tasks (exemplar-free). Build the stream anew to start over."
            )
        data = self._train[index]
        if data is None:
            raise ValueError(
                f"task {index} ({name!r}) has no training data; it can only be evaluated. Give Task a train set."
            )
        self._train[:index] = [None] * index
        object.__setattr__(self, "_opened", index)
        return data

    def open_all(self) -> list[MapStyle]:
        """Training data of every task at once, for an upper bound that no continual method reaches; then all is closed.

        Raises:
            RuntimeError: a task has been opened before.
            ValueError: a task has no training data.
        """
        if self._opened is not None:
            raise RuntimeError(
                f"all of {self.name!r} was asked for, but task {self._opened} has been opened; a stream hands out "
                "everything at once or task by task. Build the stream anew."
            )
        everything = []
        for task, data in zip(self.tasks, self._train):
            if data is None:
                raise ValueError(
                    f"{task.name!r} has no training data; it can only be evaluated. Give Task a train set."
                )
            everything.append(data)
        self._train[:] = [None] * len(self)
        object.__setattr__(self, "_opened", len(self))
        return everything

    def duplicate_classes(self) -> dict[str, tuple[str, ...]]:
        """Class name -> names of the tasks that share it (two or more). Such classes get identical text embeddings."""
        owners: dict[str, list[str]] = {}
        for task in self.tasks:
            for name in task.classes:
                owners.setdefault(name, []).append(task.name)
        return {name: tuple(tasks) for name, tasks in owners.items() if len(tasks) > 1}
