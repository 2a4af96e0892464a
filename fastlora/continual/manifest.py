"""What a run records about itself: versions, machine, and hashes of everything that decides its figures."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastlora.continual.batches import all_labels
from fastlora.continual.stream import Reference, Task, TaskStream
from fastlora.continual.text import why_uncut

# entries of a manifest that `differences` compares
TOLD_APART = ("tasks", "hashes", "class_names", "training", "reference")
_PACKAGES = ("fastlora", "torch", "torchvision", "open_clip_torch", "pillow", "triton", "numpy", "safetensors")


def versions() -> dict[str, str | None]:
    """Python's and the packages' versions; None where a package is not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}


def describe(model: nn.Module, stream: TaskStream, device: torch.device) -> dict[str, Any]:
    """The manifest's part that is known before training."""
    held_out = {} if stream.held_out is None else {stream.held_out.name: hashes(stream.held_out)}
    return {
        "benchmark": stream.name,
        "tasks": [task.name for task in stream.tasks],
        "versions": versions(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "hashes": {task.name: hashes(task) for task in stream.tasks} | held_out,
        "reference": None if stream.reference is None else reference_hashes(stream.reference),
        "training": training(stream),
        "class_names": {task.name: list(task.classes) for task in stream.tasks},
        "templates": {task.name: list(task.templates) for task in stream.tasks},
        "duplicate_classes": {name: list(tasks) for name, tasks in stream.duplicate_classes().items()},
        "union_ceiling": union_ceiling(stream),
        "text_context": why_uncut(model) or "cut after the last end-of-text token",
    }


def hashes(task: Task) -> dict[str, Any]:
    """Sizes, and SHA-256 of class names, templates, test labels and, where a data set has them, names of test images."""
    files = getattr(task.test, "files", None)
    named = {} if files is None else {"test_files_sha256": _sha256(list(files))}
    return {
        "classes": len(task.classes),
        "test_images": len(task.test),
        "classes_sha256": _sha256(list(task.classes)),
        "templates_sha256": _sha256(list(task.templates)),
        "test_labels_sha256": _sha256([int(label) for label in all_labels(task.test)]),
    } | named


def training(stream: TaskStream) -> dict[str, dict[str, Any]]:
    """Per task whose images have names: how many train, how many of them are distinct, and SHA-256 of the names in order.

    Fewer distinct images than images: some class has fewer than the shots, and was drawn with replacement.
    """
    return {
        task.name: {"images": len(files), "distinct": len(set(files)), "files_sha256": _sha256(list(files))}
        for task, files in zip(stream.tasks, stream.train_files)
        if files is not None
    }


def reference_hashes(reference: Reference) -> dict[str, Any]:
    """Sizes, and SHA-256 of the texts and, where they have them, the images' names.

    The images are not looked at, which may cost more than a method that uses none.
    """
    files = getattr(reference.images, "files", None)
    named = {} if files is None else {"files_sha256": _sha256(list(files))}
    return {
        "images": 0 if reference.images is None else len(reference.images),
        "texts": len(reference.texts),
        "texts_sha256": _sha256(list(reference.texts)),
    } | named


def union_ceiling(stream: TaskStream) -> dict[str, float]:
    """Per task, the highest accuracy in percent that the union of all classes allows; "mean" of them.

    Classes of the same prompts have the same embedding, and the first of them in the union takes every image of all.
    """
    taken: set[tuple[str, ...]] = set()
    ceilings = {}
    for task in stream.tasks:
        prompts = [tuple(template.format(name) for template in task.templates) for name in task.classes]
        lost = {label for label, texts in enumerate(prompts) if texts in taken}
        labels = [int(label) for label in all_labels(task.test)]
        ceilings[task.name] = 100.0 * sum(label not in lost for label in labels) / len(labels)
        taken.update(prompts)
    return ceilings | {"mean": sum(ceilings.values()) / len(ceilings)}


def differences(manifest: Mapping[str, Any], stream: TaskStream, *, with_training: bool) -> list[str]:
    """What a stream has otherwise than the run of this manifest, in words; nothing where it is the same.

    Args:
        with_training: also the training images, which a run that goes on needs and an evaluation does not.
    """
    found = []
    for task in stream.tasks:
        recorded, now = manifest["hashes"].get(task.name), hashes(task)
        if recorded is None:
            found.append(f"task {task.name!r} is no task of the run")
            continue
        found += _class_differences(task, manifest.get("class_names", {}).get(task.name))
        for key, what in _TOLD.items():
            if recorded.get(key) != now.get(key):
                found.append(f"{task.name!r} has other {what}")
    if with_training:
        found += _other_tasks(manifest, stream)
        recorded = manifest.get("training", {})
        found += [
            f"{name!r} has other training images"
            for name, facts in training(stream).items()
            if recorded.get(name) != facts
        ]
        reference = None if stream.reference is None else reference_hashes(stream.reference)
        if manifest.get("reference") != reference:
            found.append("the reference data is another")
    return found


def _other_tasks(manifest: Mapping[str, Any], stream: TaskStream) -> list[str]:
    """Tasks of the run that are gone, its order, and its held-out set."""
    names, recorded = [task.name for task in stream.tasks], manifest["tasks"]
    found = [f"task {name!r} is gone" for name in recorded if name not in names]
    if not found and names != recorded:
        found.append(f"the tasks were {', '.join(recorded)} and are {', '.join(names)}")
    held_out = {} if stream.held_out is None else {stream.held_out.name: hashes(stream.held_out)}
    if held_out != {name: value for name, value in manifest["hashes"].items() if name not in recorded}:
        found.append("the held-out set is another")
    return found


_TOLD = {
    "classes_sha256": "classes",
    "templates_sha256": "prompts",
    "test_labels_sha256": "test labels",
    "test_files_sha256": "test images",
}


def _class_differences(task: Task, recorded: list[str] | None) -> list[str]:
    if recorded is None or recorded == list(task.classes):
        return []
    gone = [name for name in recorded if name not in task.classes]
    new = [name for name in task.classes if name not in recorded]
    told = [f"{what} {', '.join(map(repr, names))}" for what, names in (("without", gone), ("with", new)) if names]
    return [f"{task.name!r} is now {' and '.join(told)}" if told else f"{task.name!r} has its classes in another order"]


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
