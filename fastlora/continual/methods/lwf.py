"""LwF: learning without forgetting, by what the model before the task said of earlier classes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from fastlora.continual.configs.full import LwFConfig
from fastlora.continual.features import image_features, logit_scale, text_features
from fastlora.continual.losses import distillation_loss
from fastlora.continual.methods.base import TaskContext
from fastlora.continual.methods.full import FullFineTuning
from fastlora.continual.text import cut_context


class LwF(FullFineTuning):
    """loss + distillation T^2 CE(softmax(teacher / T), softmax(student / T)) over the classes of all earlier tasks.

    LwF (arXiv 1606.09282, Eq. 2 and 3) for CLIP: the images are those of the current task, the old task's head is the
    text features of the earlier classes' training prompts, the teacher is the model before the task. In the first task
    there are no earlier classes and no such term. ZSCL's baseline (arXiv 2303.06628) compares images with the teacher's
    text features (text_features: teacher), with both towers in training; by its published script over the current
    task's classes, and in both directions. Simplified: no warm-up of a new head, since text makes the heads.
    """

    config_class = LwFConfig

    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__(config, **options)
        self.teacher: Any = None
        self.old_prompts: Tensor | None = None  # [C, L]
        self.teacher_texts: Tensor | None = None  # [C, D]

    def begin_task(self, ctx: TaskContext) -> None:
        super().begin_task(ctx)
        if not ctx.earlier:
            return
        self.teacher = copy.deepcopy(ctx.model).eval().requires_grad_(False)
        texts = [task.templates[0].format(name) for task in ctx.earlier for name in task.classes]
        self.old_prompts = cut_context(ctx.model, ctx.tokenizer(texts)).to(ctx.device)
        self.teacher_texts = text_features(self.teacher, self.old_prompts)

    def extra_loss(self, ctx: TaskContext) -> Tensor | None:
        if self.old_prompts is None or self.teacher_texts is None:
            return None
        student_texts = self.teacher_texts
        if self.config.text_features == "student":
            student_texts = text_features(ctx.model, self.old_prompts)
        with torch.no_grad():
            own = image_features(self.teacher, ctx.step["images"])
            features = ctx.world.gather(own, len(ctx.step["labels"]))
        scale = logit_scale(ctx.model)
        teacher = scale * features @ self.teacher_texts.t()  # [B, C]
        student = scale * ctx.step["image_features"] @ student_texts.t()
        return self.config.distillation * distillation_loss(teacher, student, self.config.temperature)

    def _forget_task(self, model: Any) -> None:
        super()._forget_task(model)
        self.teacher = self.old_prompts = self.teacher_texts = None
