"""What each step of a task trains on: a batch, and the prompts of the task that it belongs to."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.continual.batches import parts
from fastlora.continual.device import to_device
from fastlora.continual.distributed import ALONE, World
from fastlora.continual.stream import MapStyle, Task, TaskStream
from fastlora.continual.text import cut_context


class Batch(NamedTuple):
    """Images [B, 3, H, W], labels [B] and prompt tokens [C, L] of one task, on the device; source counts from 0.

    Where several processes train, images are the `World.part` of this one; labels and prompts are those of all rows.
    """

    images: Tensor
    labels: Tensor
    prompts: Tensor
    source: int


class TrainingData:
    """Batches without end, of one task, or of several in turn.

    Args:
        tasks: where the classes and the prompts come from.
        data: their training data, in the same order.
        numbers: their numbers in the stream, from 1; the order of a task's images follows from its number.
        model, tokenizer: for the prompts, which are cut to the longest of their task.
        batch_size: images of a whole batch.
        world: the processes that share each batch.
    Attributes:
        sizes: number of images by task.
    """

    def __init__(
        self,
        tasks: list[Task],
        data: list[MapStyle],
        numbers: list[int],
        model: Any,
        tokenizer: Any,
        batch_size: int,
        seed: int,
        device: torch.device,
        world: World = ALONE,
    ) -> None:
        self.sizes = [len(part) for part in data]
        self._device, self._world = device, world
        self._parts = [parts(each, batch_size, seed, number, world) for each, number in zip(data, numbers)]
        self._prompts = [prompts(task, model, tokenizer).to(device) for task in tasks]

    def __len__(self) -> int:
        """Number of tasks that take turns."""
        return len(self._parts)

    def batch(self, iteration: int) -> Batch:
        """The next batch; iterations count up from 0."""
        source = iteration % len(self)
        images, labels, size = next(self._parts[source])
        images, labels = to_device(images, self._device), to_device(labels, self._device)
        return Batch(images, self._world.gather(labels, size), self._prompts[source], source)


def prompts(task: Task, model: Any, tokenizer: Any) -> Tensor:
    """[C, L]: the training prompt of every class, cut after the longest."""
    return cut_context(model, tokenizer([task.templates[0].format(name) for name in task.classes]))


def open_data(stream: TaskStream, number: int, joint: bool) -> tuple[list[Task], list[MapStyle], list[int]]:
    """(tasks, their training data, their numbers): of task `number` alone, or of all."""
    if joint:
        return list(stream.tasks), stream.open_all(), list(range(1, len(stream) + 1))
    return [stream.tasks[number - 1]], [stream.open_task(number - 1)], [number]
