"""ZSCL: what the base model says of reference images and texts, and a mean over the weights of a task."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastlora.continual.configs.full import ZSCLConfig
from fastlora.continual.features import image_features, logit_scale, text_features
from fastlora.continual.methods.base import TaskContext
from fastlora.continual.methods.distillation import ReferenceData, both_ways, check_reference
from fastlora.continual.methods.full import FullFineTuning
from fastlora.continual.methods.weights import other_weights
from fastlora.continual.stream import TaskStream


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
        self.reference: ReferenceData | None = None
        self.features: dict[str, Tensor] = {}  # the base model's, of images and texts [n, D]
        self.mean: dict[str, Tensor] = {}
        self.averaged = 0
        self.drawn: dict[str, Iterator[Tensor]] = {}  # indices of a batch
        self.pixels: Iterator[Tensor] = iter(())

    def check(self, stream: TaskStream) -> None:
        check_reference(self.config, stream, images=True)

    def begin_task(self, ctx: TaskContext) -> None:
        super().begin_task(ctx)
        if self.reference is None:
            self.reference = ReferenceData(ctx, self.config.references)
            with other_weights(ctx.model, ctx.base) as base:
                self.features = self.reference.features(base)
        self.drawn = self.reference.draws(self.config.batch_size, ctx)
        self.pixels = self.reference.pixels(self.config.batch_size, ctx)
        self.mean, self.averaged = {name: p.detach().clone() for name, p in self.trained.items()}, 1

    def extra_loss(self, ctx: TaskContext) -> Tensor:
        config, reference = self.config, self.reference
        assert reference is not None
        images, texts = next(self.drawn["images"]), next(self.drawn["texts"])
        teacher_images = self.features["images"][images.to(ctx.device)]
        teacher_texts = self.features["texts"][texts.to(ctx.device)]
        student_images = image_features(ctx.model, next(self.pixels))
        student_texts = teacher_texts
        if config.text_features == "student":
            student_texts = text_features(ctx.model, reference.tokens[texts.to(ctx.device)])
        scale = logit_scale(ctx.model)
        teacher = scale * teacher_images @ teacher_texts.t()  # [images, texts]
        student = scale * student_images @ student_texts.t()
        loss = config.distillation * both_ways(teacher, student, config.temperature)
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
        self.mean, self.averaged, self.drawn, self.pixels = {}, 0, {}, iter(())
