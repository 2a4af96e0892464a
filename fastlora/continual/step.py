"""One training step of a task: features, loss, backward, optimizer; and the ways in which it can be carried out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.continual.config import RunConfig
from fastlora.continual.distributed import World
from fastlora.continual.features import image_features, logit_scale, text_features
from fastlora.continual.losses import contrastive_loss
from fastlora.continual.methods.base import Method, TaskContext
from fastlora.continual.precision import DTYPES, computing_in
from fastlora.continual.sharding import sharding
from fastlora.continual.training_data import Batch


class TrainingStep:
    """A step of the task in work. Calling it trains on a batch; no value is read back from the device.

    With `accumulate` > 1 the images go through the model in so many parts, one after the other, and memory for
    activations is that of one part. The loss compares all images of the batch with each other, so it cannot be summed
    over parts: features are computed first, without a graph, then the loss and its gradient with respect to them, then
    each part again, with that gradient (gradient cache, arXiv 2101.06983, section 3.2; as open_clip's accum_freq). What
    it costs is a second forward pass of the images. Dropout draws the same in both passes.

    Several processes (ctx.world) compute the features of a part of the images and prompts each, all of them the loss of
    the whole batch, and step with the same gradients.

    In float16 the loss is scaled by torch.amp.GradScaler, and a step whose gradients overflow is skipped; to know
    that, it does wait for the device.

    Args:
        method: its hooks see ctx.step.
        ctx: of the task; its optimizer is set.
        config: dtype, accumulate and compile.
    """

    def __init__(self, method: Method, ctx: TaskContext, config: RunConfig) -> None:
        self._method, self._ctx, self._parts = method, ctx, config.accumulate
        self._logit_scale = logit_scale(ctx.model)  # frozen
        self._frozen_texts: dict[int, Tensor] = {}
        # gathered rows get their gradient `size` times: at this scale the towers see what those of one process see
        start = 2.0**16 / ctx.world.size
        self._scaler = torch.amp.GradScaler(ctx.device.type, init_scale=start, enabled=config.dtype == "float16")
        self._encode_image, self._encode_text = _encoders(config.compile)

    def __call__(self, iteration: int, batch: Batch) -> Tensor:
        """Train on `batch`; the loss, 0-d, detached."""
        ctx = self._ctx
        features = _Features(self._encode_image, ctx.model, batch, self._parts, ctx.world)
        text = self._texts(batch)
        loss = contrastive_loss(features.all, text, batch.labels, self._logit_scale, ctx.seen_classes)
        ctx.step = {"iteration": iteration, "images": batch.images, "labels": batch.labels, "loss": loss}
        ctx.step |= {"image_features": features.all, "text_features": text}
        for extra_loss in (self._method.extra_loss(ctx), ctx.distillation and ctx.distillation.loss(ctx)):
            if extra_loss is not None:
                loss = loss + extra_loss

        ctx.optimizer.zero_grad()
        self._scaler.scale(loss).backward()
        features.backward()
        ctx.world.average_gradients(self._parameters())
        self._clip()
        self._scaler.step(ctx.optimizer)  # AdamW, then the proximal step on the gates
        self._scaler.update()
        self._method.after_step(ctx)
        return loss.detach()

    def _clip(self) -> None:
        largest, optimizer = self._method.config.clip_norm, self._ctx.optimizer
        if largest:
            self._scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self._parameters(), largest)

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self._ctx.optimizer.param_groups for parameter in group["params"]]

    def _texts(self, batch: Batch) -> Tensor:
        found = self._frozen_texts.get(batch.source)
        if found is None:
            world, total = self._ctx.world, len(batch.prompts)
            found = world.gather(self._encode_text(self._ctx.model, batch.prompts[world.part(total)]), total)
            if not found.requires_grad:  # a frozen text tower is encoded once per task
                self._frozen_texts[batch.source] = found
        return found


class _Features:
    """Image features of a batch in one graph, or in parts whose graphs are made when the gradient is there.

    Attributes:
        all: [B, D], unit rows.
    """

    def __init__(self, encode: Callable[..., Tensor], model: Any, batch: Batch, parts: int, world: World) -> None:
        self._encode, self._model = encode, model
        self._images: tuple[Tensor, ...] = ()
        self._states: list[_RandomState] = []
        total = len(batch.labels)
        if parts == 1:
            self.all = world.gather(encode(model, batch.images), total)
            return
        # as many in every process: what a sharded model does in a forward pass, all processes do together
        parts = max(1, min(parts, total // world.size))
        self._images, features = batch.images.tensor_split(parts), []
        with torch.no_grad():
            for part in self._images:
                self._states.append(_RandomState(part.device))
                features.append(encode(model, part))
        self._own = torch.cat(features).requires_grad_()
        self.all = world.gather(self._own, total)

    def backward(self) -> None:
        """The gradients of the parts, once that of `all` is known."""
        if not self._images:
            return
        whole = self._own.grad
        assert whole is not None
        for part, state, grad in zip(self._images, self._states, whole.tensor_split(len(self._images))):
            state.restore()
            features = self._encode(self._model, part)
            if features.requires_grad:  # the image tower may be frozen
                features.backward(grad)


class _RandomState:
    """State of torch's global generators for the CPU and `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._cpu = torch.get_rng_state()
        self._cuda = None if self._device is None else torch.cuda.get_rng_state(self._device)

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None and self._device is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


def _encoders(compile: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    if compile == "no":
        return image_features, text_features
    # what an earlier task compiled is for modules that are gone; kept, it would count against torch's recompile limit
    torch.compiler.reset()
    mode = None if compile == "default" else "max-autotune-no-cudagraphs"
    return torch.compile(image_features, mode=mode), torch.compile(text_features, mode=mode)


@contextlib.contextmanager
def training_step(method: Method, ctx: TaskContext, config: RunConfig) -> Iterator[TrainingStep]:
    """A step for the task that has begun. Within, the model computes as `config` says; afterwards as before."""
    model, dtype = ctx.model, DTYPES[config.dtype]
    shared = sharding(model, ctx.world, dtype) if config.parallel == "fsdp" else contextlib.nullcontext()
    with shared, computing_in(dtype, model), _checkpointing(model, config.activation_checkpointing):
        model.train()
        yield TrainingStep(method, ctx, config)


@contextlib.contextmanager
def _checkpointing(model: Any, wanted: bool) -> Iterator[None]:
    """open_clip's activation checkpointing, block by block."""
    if wanted:
        model.set_grad_checkpointing(True)
    try:
        yield
    finally:
        if wanted:
            model.set_grad_checkpointing(False)
