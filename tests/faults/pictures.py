"""A stream of images that lie on disk, 16 px each."""

from __future__ import annotations

from pathlib import Path

import torch
from continual.tiny import tiny_task
from open_clip.transform import image_transform
from PIL import Image

from fastlora.continual.datasets.images import Decoder, LazyImages
from fastlora.continual.datasets.split import Images
from fastlora.continual.datasets.transforms import Transforms
from fastlora.continual.stream import Task, TaskStream


def picture_stream(folder: Path) -> TaskStream:
    """Three tasks over the pictures in `folder`, which are made where they are not there."""
    transforms = Transforms.of(image_transform(16, is_train=True), image_transform(16, is_train=False))
    tasks = [_task(folder, name, seed, transforms) for seed, name in enumerate(("red", "green", "blue"), start=1)]
    return TaskStream("tiny", tasks, held_out=tiny_task("grey", 5, seed=4))


def _task(folder: Path, name: str, seed: int, transforms: Transforms, classes: int = 3, each: int = 6) -> Task:
    names, labels = [], []
    generator = torch.Generator().manual_seed(seed)
    for index in range(classes * each):
        path = folder / name / f"{index:02d}.png"
        pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.numpy()).save(path)
        names.append(f"{name}/{path.name}")
        labels.append(index % classes)
    images, decoder = Images(tuple(names), tuple(labels)), Decoder(2)
    train, test = (LazyImages(folder, images, transforms, decoder, training=side) for side in (True, False))
    return Task(name, tuple(f"{name}{letter}" for letter in "abc"), ("a photo of a {}",), train, test)
