"""Holding a model to what a teacher says of how images and texts go together: ZSCL's loss, for any method with adapters."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fastlora.continual.batches import generator_for, in_turn
from fastlora.continual.configs.base import AdapterConfig, MethodConfig
from fastlora.continual.device import to_device
from fastlora.continual.features import image_features, logit_scale, text_features
from fastlora.continual.losses import distillation_loss
from fastlora.continual.methods.base import TaskContext
from fastlora.continual.methods.weights import put_back
from fastlora.continual.stream import Reference, TaskStream
from fastlora.continual.text import cut_context

_AT_ONCE = 256


class Distillation:
    """distillation (L_image + L_text), with the similarities s of a batch of images and of texts of no task,

        L_image = T^2 CE(softmax(s_teacher / T), softmax(s / T))     over the texts, for each image
        L_text  = the same of the transposed similarities            over the images, for each text

    as in ZSCL (arXiv 2303.06628), whose images are reference data and whose teacher is the base model. With distil_on
    "task" the images are those of the step in work, which have been encoded already: no image of another task or of
    elsewhere is needed, a list of sentences is enough. With the model before the task as the teacher that is the idea of
    VR-LwF (learning without forgetting via replayed vocabulary, arXiv 2207.09248), which makes its texts of words drawn
    from the tokenizer. In s the student's images meet the student's texts. What of the teacher cannot change during a
    task is computed once.

    Args:
        ctx: of a task that has not begun: its model is the plain one.
        config: the method's; distillation, temperature, teacher, distil_on, batch_size and where.
    """

    def __init__(self, ctx: TaskContext, config: AdapterConfig) -> None:
        self.config = config
        self.teacher = copy.deepcopy(ctx.model).eval().requires_grad_(False)
        if config.teacher == "base":
            put_back(self.teacher, ctx.base)
        self.reference = ReferenceData(ctx, config.references, images=config.distil_on == "reference")
        self.features = self.reference.features(self.teacher)
        self.draws = self.reference.draws(config.batch_size, ctx)
        self.pixels = self.reference.pixels(config.batch_size, ctx)

    def loss(self, ctx: TaskContext) -> Tensor:
        """0-d, of the step in work."""
        config, where = self.config, self.config.where
        texts = next(self.draws["texts"]).to(ctx.device)
        teacher_texts = self.features["texts"][texts]
        student_texts = teacher_texts  # a tower that does not train is the teacher's
        if where != "vision":
            student_texts = text_features(ctx.model, self.reference.tokens[texts])
        if config.distil_on == "task":
            student_images = ctx.step["image_features"]
            with torch.no_grad():
                own = image_features(self.teacher, ctx.step["images"])
                teacher_images = ctx.world.gather(own, len(ctx.step["labels"]))
        else:
            images = next(self.draws["images"])
            teacher_images = self.features["images"][images.to(ctx.device)]
            student_images = teacher_images
            if where != "text":
                student_images = image_features(ctx.model, next(self.pixels))
        scale = logit_scale(ctx.model)
        teacher, student = scale * teacher_images @ teacher_texts.t(), scale * student_images @ student_texts.t()
        return config.distillation * both_ways(teacher, student, config.temperature)


class ReferenceData:
    """Images and texts of no task, as many as are used.

    Args:
        largest: number of each, at most; drawn from the seed.
        images: whether the images are used.
    """

    def __init__(self, ctx: TaskContext, largest: int, images: bool = True) -> None:
        data: Any = ctx.reference
        self.device, self._data = ctx.device, data
        self.chosen = _chosen(len(data.images) if images else 0, largest, ctx.seed, "images")
        texts = [data.texts[i] for i in _chosen(len(data.texts), largest, ctx.seed, "texts").tolist()]
        self.tokens = cut_context(ctx.model, ctx.tokenizer(texts)).to(ctx.device)

    @torch.no_grad()
    def features(self, model: Any) -> dict[str, Tensor]:
        """The unit features that `model` gives now, [n, D] for texts and, where they are used, images."""
        training = model.training
        model.eval()
        found = {"texts": torch.cat([text_features(model, part) for part in self.tokens.split(_AT_ONCE)])}
        if len(self.chosen):
            found["images"] = torch.cat(
                [image_features(model, part) for part in self._on_device(self.chosen.split(_AT_ONCE))]
            )
        model.train(training)
        return found

    def draws(self, size: int, ctx: TaskContext) -> dict[str, Iterator[Tensor]]:
        """Indices of batches without end, for images and texts; functions of seed and task."""
        available = {"images": len(self.chosen), "texts": len(self.tokens)}
        return {kind: endless(count, size, ctx.seed, kind, ctx.number) for kind, count in available.items() if count}

    def pixels(self, size: int, ctx: TaskContext) -> Iterator[Tensor]:
        """[size, 3, H, W] of the images that `draws` gives, batch by batch."""
        order = endless(len(self.chosen), size, ctx.seed, "images", ctx.number)
        return self._on_device(self.chosen[part] for part in order)

    def _on_device(self, order: Iterable[Tensor]) -> Iterator[Tensor]:
        return (to_device(images, self.device) for images, _ in in_turn(self._data.images, order))


def both_ways(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """Distillation over the texts for each image, plus over the images for each text; logits [images, texts]."""
    return distillation_loss(teacher, student, temperature) + distillation_loss(teacher.t(), student.t(), temperature)


def distils(config: MethodConfig) -> TypeGuard[AdapterConfig]:
    """Whether a method that is not made of distillation was asked for it."""
    return isinstance(config, AdapterConfig) and config.distillation > 0


def check_reference(config: MethodConfig, stream: TaskStream, images: bool) -> None:
    """Raises ValueError where the stream lacks the reference data that the method distils on."""
    reference: Reference | None = stream.reference
    if reference is None or (images and reference.images is None):
        needed = "images and texts" if images else "texts"
        given = "no reference data" if reference is None else "reference data without images"
        path = "--data.reference DIR" if images else "--data.captions FILE (one sentence a line)"
        built = "Reference(images, texts)" if images else "Reference(None, texts)"
        raise ValueError(
            f"the stream {stream.name!r} has {given}, and {config.name} distils on {needed} of no task. Give {path} where "
            f"the benchmark reads images from disk, or TaskStream(..., reference={built}), or train without distillation."
        )


def endless(available: int, size: int, seed: int, *purpose: str | int) -> Iterator[Tensor]:
    """Indices [size] without end, every one once in each epoch."""
    epoch = 0
    while True:
        yield from torch.randperm(available, generator=generator_for(seed, "reference", *purpose, epoch)).split(size)
        epoch += 1


def _chosen(available: int, largest: int, seed: int, kind: str) -> Tensor:
    return torch.randperm(available, generator=generator_for(seed, "reference", kind))[:largest]
