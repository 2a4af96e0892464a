"""Accuracy of a CLIP model on every data set of a stream, in both label spaces, in one pass over the images."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.continual.batches import in_order
from fastlora.continual.device import to_device
from fastlora.continual.distributed import ALONE, World
from fastlora.continual.features import image_features, text_features
from fastlora.continual.precision import computing_in
from fastlora.continual.stream import Task, TaskStream
from fastlora.continual.text import cut_context

_PROMPTS_AT_ONCE = 512


@dataclass(frozen=True)
class Evaluation:
    """Accuracies in percent, in stream order.

    Args:
        own: over the tested data set's own classes.
        union: over the classes of all tasks, seen and unseen, without task identity.
        held_out: the held-out set over its own classes; None where the stream has none.
        seconds: wall time.
    """

    own: tuple[float, ...]
    union: tuple[float, ...]
    held_out: float | None
    seconds: float


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    tokenizer: Any,
    stream: TaskStream,
    *,
    batch_size: int = 256,
    dtype: torch.dtype = torch.float32,
    model_for: Callable[[nn.Module, int], AbstractContextManager[nn.Module]] | None = None,
    world: World = ALONE,
) -> Evaluation:
    """Classify every test image by the nearest class embedding.

    A class embedding is the normalised mean over the data set's templates of normalised text features. In the union
    label space a prediction counts only for the data set's own copy of a class, also where two share a class name.

    Args:
        model: an open_clip model; left in the mode that it was in.
        tokenizer: list of texts -> [n, context] integers.
        stream: whose test data is classified, the held-out set included.
        batch_size: images per forward pass.
        dtype: of weights and activations; features and similarities are float32.
        model_for: (model, index) -> context in which the model for data set `index` is there, its text tower included;
            None where one model serves them all. The held-out set is tested with `model` itself.
        world: processes with the same model, each of which takes a share of the images and prompts; all get the result.
    Returns:
        Evaluation: accuracies in percent, in stream order.
    Raises:
        RuntimeError: the model gives features that are not finite.
    """
    start = time.perf_counter()
    training = model.training
    model.eval()
    try:
        with contextlib.nullcontext() if model_for else computing_in(dtype, model):
            heads = None if model_for else _heads(model, tokenizer, stream, world)
            offset, own_accuracy, union_accuracy, held_out = 0, [], [], None
            for index, task in enumerate(stream.tasks):
                its_own = model_for(model, index) if model_for else contextlib.nullcontext(model)
                with its_own as its_model, computing_in(dtype, its_model):
                    its_model.eval()
                    its_heads = heads or _heads(its_model, tokenizer, stream, world)
                    spaces = [(its_heads[index], 0), (torch.cat(its_heads), offset)]
                    own, among_all = _accuracies(its_model, task, spaces, batch_size, world)
                own_accuracy.append(own)
                union_accuracy.append(among_all)
                offset += len(task.classes)
            if stream.held_out is not None:
                with computing_in(dtype, model):
                    head = class_embeddings(model, tokenizer, stream.held_out, world)
                    (held_out,) = _accuracies(model, stream.held_out, [(head, 0)], batch_size, world)
    finally:
        model.train(training)
    return Evaluation(tuple(own_accuracy), tuple(union_accuracy), held_out, time.perf_counter() - start)


def _heads(model: nn.Module, tokenizer: Any, stream: TaskStream, world: World) -> list[Tensor]:
    return [class_embeddings(model, tokenizer, task, world) for task in stream.tasks]


def class_embeddings(model: nn.Module, tokenizer: Any, task: Task, world: World = ALONE) -> Tensor:
    """[C, D], unit rows: normalised mean over the templates of normalised text features."""
    prompts = [template.format(name) for template in task.templates for name in task.classes]
    tokens = cut_context(model, tokenizer(prompts)).to(_device(model))
    own = tokens[world.part(len(tokens))].split(_PROMPTS_AT_ONCE)
    features = world.gather(torch.cat([text_features(model, part) for part in own]), len(tokens))
    mean = features.unflatten(0, (len(task.templates), len(task.classes))).mean(dim=0)
    return _finite(F.normalize(mean, dim=-1), f"text features of {task.name!r}")


def _accuracies(
    model: nn.Module, task: Task, heads: list[tuple[Tensor, int]], batch_size: int, world: World
) -> list[float]:
    """Percent correct for each (class embeddings, column of the task's class 0)."""
    total = len(task.test)
    features, labels = _image_features(model, task, batch_size, world)
    correct = [((features @ head.t()).argmax(dim=-1) == labels + offset).sum() for head, offset in heads]
    return [100.0 * count / total for count in world.sum(torch.stack(correct)).tolist()]


def _image_features(model: Any, task: Task, batch_size: int, world: World) -> tuple[Tensor, Tensor]:
    """Those of this process's share of the images."""
    total, device, features, labels = len(task.test), _device(model), [], []
    for images, targets in in_order(task.test, batch_size, world.part(total)):
        features.append(image_features(model, to_device(images, device)))
        labels.append(targets)
    share = world.share(total)
    own = slice(share.stop - share.start)
    found = _finite(torch.cat(features), f"image features of {task.name!r}")
    return found[own], torch.cat(labels).to(device)[own]


def _finite(features: Tensor, what: str) -> Tensor:
    # argmax of NaN is an index like any other: without this a broken model scores as a constant guess
    if not bool(torch.isfinite(features).all()):
        raise RuntimeError(f"{what} are not finite; an accuracy would mean nothing. Check the weights of the model.")
    return features


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
