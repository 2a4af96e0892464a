"""What a run records about itself: versions, machine, and hashes of everything that decides its figures."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from typing import Any

import torch
from torch import nn

from fastlora.continual.batches import all_labels
from fastlora.continual.stream import Reference, Task, TaskStream
from fastlora.continual.text import why_uncut

_PACKAGES = ("fastlora", "torch", "open_clip_torch", "triton", "numpy", "safetensors")


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
        "duplicate_classes": {name: list(tasks) for name, tasks in stream.duplicate_classes().items()},
        "text_context": why_uncut(model) or "cut after the last end-of-text token",
    }


def hashes(task: Task) -> dict[str, Any]:
    """Sizes, and SHA-256 of class names, templates and test labels."""
    return {
        "classes": len(task.classes),
        "test_images": len(task.test),
        "classes_sha256": _sha256(list(task.classes)),
        "templates_sha256": _sha256(list(task.templates)),
        "test_labels_sha256": _sha256([int(label) for label in all_labels(task.test)]),
    }


def reference_hashes(reference: Reference) -> dict[str, Any]:
    """Sizes, and SHA-256 of the texts; the images are not looked at, which may cost more than a method that uses none."""
    return {
        "images": len(reference.images),
        "texts": len(reference.texts),
        "texts_sha256": _sha256(list(reference.texts)),
    }


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
