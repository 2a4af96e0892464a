"""ZSCL: what the base model says of reference images and texts, and a mean over the weights of a task."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastlora.continual.batches import gather, generator_for
from fastlora.continual.configs.full import ZSCLConfig
from fastlora.continual.losses import distillation_loss
from fastlora.continual.methods.base import TaskContext
from fastlora.continual.methods.full import FullFineTuning
from fastlora.continual.methods.weights import other_weights
from fastlora.continual.stream import TaskStream
from fastlora.continual.text import cut_context, encode_text

_AT_ONCE = 256


class ZSCL(FullFineTuning):
    """loss + distillation (L_image + L_text) + consolidation ||theta - theta_previous||^2, then the mean of the weights.

    ZSCL (arXiv 2303.06628), by its published code. With the similarities s of a batch of reference images and reference texts, times
    the temperature of CLIP,

        L_image = T^2 CE(softmax(s_teacher / T), softmax(s / T))     over the texts, for each image
        L_text  = the same of the transposed similarities            over the images, for each text

    The teacher is the base model at all times. In s the student's images meet the teacher's texts, as in the published
    code (text_features: teacher), or its own. Weight ensemble: with n weights in the mean,
    theta_mean <- (n theta_mean + theta) / (n + 1) every average_every steps, from the weights before the task on; the
    mean is what the task leaves. consolidation is 1 in the script published for MTIL, and 0 here.

    Simplified: a batch of texts a step as large as that of the images, in place of all of them; the teacher's features
    of the reference data are computed once, not at every step, which changes nothing.
    """

    config_class = ZSCLConfig

    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__(config, **options)
        self.reference: _TeacherFeatures | None = None
        self.mean: dict[str, Tensor] = {}
        self.averaged = 0
        self.draws: dict[str, Iterator[Tensor]] = {}

    def check(self, stream: TaskStream) -> None:
        if stream.reference is None:
            raise ValueError(
                f"the stream {stream.name!r} has no reference data, which zscl distils on. Give --data.reference DIR where "
                "the benchmark reads images from disk, or TaskStream(..., reference=Reference(images, texts)), or train "
                "another method."
            )

    def begin_task(self, ctx: TaskContext) -> None:
        super().begin_task(ctx)
        if self.reference is None:
            self.reference = _TeacherFeatures(ctx, self.config.references)
        self.draws = {
            kind: _draws(len(features), self.config.batch_size, ctx.seed, kind, ctx.number)
            for kind, features in self.reference.features.items()
        }
        self.mean, self.averaged = {name: p.detach().clone() for name, p in self.trained.items()}, 1

    def extra_loss(self, ctx: TaskContext) -> Tensor:
        config, reference = self.config, self.reference
        images, texts = next(self.draws["images"]), next(self.draws["texts"])
        teacher_images = reference.features["images"][images.to(ctx.device)]
        teacher_texts = reference.features["texts"][texts.to(ctx.device)]
        student_images = ctx.model.encode_image(reference.images(images).to(ctx.device), normalize=True)
        student_texts = teacher_texts
        if config.text_features == "student":
            student_texts = encode_text(ctx.model, reference.tokens[texts.to(ctx.device)], normalize=True)
        scale = ctx.model.logit_scale.detach().exp()
        teacher = scale * teacher_images @ teacher_texts.t()  # [images, texts]
        student = scale * student_images @ student_texts.t()
        loss = distillation_loss(teacher, student, config.temperature)
        loss = config.distillation * (loss + distillation_loss(teacher.t(), student.t(), config.temperature))
        if config.consolidation:
            moved = [(p - self.before[name]).square().sum() for name, p in self.trained.items()]
            loss = loss + config.consolidation * torch.stack(moved).sum()
        return loss

    @torch.no_grad()
    def after_step(self, ctx: TaskContext) -> None:
        every = self.config.average_every
        if every and (ctx.step["iteration"] + 1) % every == 0:
            self.averaged += 1
            for name, parameter in self.trained.items():
                self.mean[name].lerp_(parameter, 1 / self.averaged)

    @torch.no_grad()
    def end_task(self, ctx: TaskContext) -> None:
        if self.averaged > 1:
            for name, parameter in self.trained.items():
                parameter.copy_(self.mean[name])
        super().end_task(ctx)

    def _forget_task(self, model: Any) -> None:
        super()._forget_task(model)
        self.mean, self.averaged, self.draws = {}, 0, {}


class _TeacherFeatures:
    """The reference data that is used, and the base model's unit features of it, [n, D] for images and texts."""

    def __init__(self, ctx: TaskContext, largest: int) -> None:
        self._data, model = ctx.reference, ctx.model
        self._chosen = _chosen(len(self._data.images), largest, ctx.seed, "images")
        texts = [self._data.texts[i] for i in _chosen(len(self._data.texts), largest, ctx.seed, "texts").tolist()]
        self.tokens = cut_context(model, ctx.tokenizer(texts)).to(ctx.device)
        training = model.training
        model.eval()
        with torch.no_grad(), other_weights(model, ctx.base):
            of_images = [
                model.encode_image(self.images(part).to(ctx.device), normalize=True)
                for part in torch.arange(len(self._chosen)).split(_AT_ONCE)
            ]
            of_texts = [encode_text(model, part, normalize=True) for part in self.tokens.split(_AT_ONCE)]
        model.train(training)
        self.features = {"images": torch.cat(of_images), "texts": torch.cat(of_texts)}

    def images(self, indices: Tensor) -> Tensor:
        return gather(self._data.images, self._chosen[indices])[0]


def _chosen(available: int, largest: int, seed: int, kind: str) -> Tensor:
    return torch.randperm(available, generator=generator_for(seed, "reference", kind))[:largest]


def _draws(available: int, size: int, seed: int, *purpose: str | int) -> Iterator[Tensor]:
    """Indices [size] without end, every one once in each epoch."""
    epoch = 0
    while True:
        yield from torch.randperm(available, generator=generator_for(seed, "reference", *purpose, epoch)).split(size)
        epoch += 1
