"""Options of benchmarks that read images from disk."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fastlora.continual.configs.base import check_count, check_flag, check_number, check_one_of

PROMPTS = ("per-dataset", "single")
VERIFY = ("headers", "decode", "none")


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and which of them are used. None leaves the choice to the benchmark.

    Args:
        root: directory that holds the data sets; see docs/benchmarks.md for what lies in it.
        order: of the tasks of mtil, I or II.
        shots: training images per class, 0 for all of them.
        prompts: of xtail, per-dataset (one template each) or single ("a photo of a {}." for all).
        tasks: of folders, in order; each a directory below root, or a mapping with path, name and templates.
        split: of folders, share of training images of a task without train and test directories, in (0, 1).
        templates: of folders, for every task that names none; each has one {}, and the first is for training.
        reference: directory of images of no task, for methods that distil on them.
        captions: file of one sentence a line, for methods that distil on texts of no task; without it, the names of the
            folders of reference, or of ImageNet's classes.
        workers: threads that decode images; one a core by default.
        cache_gb: memory for decoded test images, in 10^9 bytes; 0 decodes them at every evaluation.
        cache_dir: directory that keeps decoded and resized images from run to run, for any number of runs at once: test
            and reference images, and with cache_crops those of training. New, empty, or made by an earlier run.
        cache_dir_gb: what it may take on disk, in 10^9 bytes; where it is full, the longest unused images go.
        cache_crops: keep every random crop of training there too. It pays where a run of the same seed, batch size and
            images comes again, such as another method; a first run meets every crop once.
        verify: before training, open every image (headers), read it whole (decode), or trust it (none).
    """

    root: str | None = None
    order: str | None = None
    shots: int | None = None
    prompts: str | None = None
    tasks: list[str | dict[str, Any]] | None = None
    split: float | None = None
    templates: list[str] | None = None
    reference: str | None = None
    captions: str | None = None
    workers: int | None = None
    cache_gb: float | None = None
    cache_dir: str | None = None
    cache_dir_gb: float | None = None
    cache_crops: bool | None = None
    verify: str | None = None

    def __post_init__(self) -> None:
        for name in ("root", "reference", "captions", "cache_dir"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value.strip()):
                raise ValueError(f"data.{name} is {value!r}; it must be a path.")
        for name, accepted in (("order", ("I", "II")), ("prompts", PROMPTS), ("verify", VERIFY)):
            if getattr(self, name) is not None:
                check_one_of(f"data.{name}", getattr(self, name), accepted)
        if self.shots is not None:
            check_count("data.shots", self.shots, "Give the training images per class, 0 for all.", least=0)
        if self.workers is not None:
            check_count("data.workers", self.workers, "Give the number of threads that decode images.")
        if self.cache_gb is not None:
            check_number("data.cache_gb", self.cache_gb, ">= 0", lambda v: v >= 0, "Give gigabytes, such as 4.")
        if self.cache_dir_gb is not None:
            check_number("data.cache_dir_gb", self.cache_dir_gb, "> 0", lambda v: v > 0, "Give gigabytes, such as 20.")
        if self.cache_crops is not None:
            check_flag("data.cache_crops", self.cache_crops)
        if self.split is not None:
            check_number("data.split", self.split, "in (0, 1)", lambda v: 0 < v < 1, "Give a share, such as 0.8.")
        if self.tasks is not None:
            object.__setattr__(self, "tasks", [FolderTask.of(task).as_given() for task in _listed("tasks", self.tasks)])
        if self.templates is not None:
            object.__setattr__(self, "templates", [str(text) for text in _listed("templates", self.templates)])

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for YAML."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class FolderTask:
    """A directory of class folders. `name` and `templates` are None where the task does not say."""

    path: str
    name: str | None = None
    templates: tuple[str, ...] | None = None

    @classmethod
    def of(cls, given: Any) -> FolderTask:
        """From a path, or from a mapping with path and perhaps name and templates."""
        if isinstance(given, str) and given.strip():
            return cls(given)
        if not isinstance(given, dict) or not isinstance(given.get("path"), str):
            raise ValueError(
                f"data.tasks holds {given!r}; each must be a directory, or a mapping with path, name, templates."
            )
        for key in given:
            check_one_of(f"key of the task {given['path']!r}", key, [item.name for item in dataclasses.fields(cls)])
        templates = given.get("templates")
        if templates is not None:
            templates = tuple(str(text) for text in _listed(f"templates of the task {given['path']!r}", templates))
        return cls(given["path"], given.get("name"), templates)

    def as_given(self) -> str | dict[str, Any]:
        """What `of` reads."""
        if self.name is None and self.templates is None:
            return self.path
        given = {"path": self.path, "name": self.name, "templates": self.templates and list(self.templates)}
        return {key: value for key, value in given.items() if value is not None}


def _listed(name: str, value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"data.{name} is {value!r}; it must be a list with at least one entry, such as [birds, cars].")
    return list(value)
