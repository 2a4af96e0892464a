"""A whole training step as one CUDA graph: forward, loss, backward, optimizer and proximal step without the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.continual.config import RunConfig
from fastlora.continual.methods.base import Method, TaskContext
from fastlora.continual.methods.distillation import distils
from fastlora.continual.methods.gated import GatedMethod
from fastlora.continual.step import TrainingStep
from fastlora.continual.training_data import Batch

WARM_UP = 3  # steps of the task before the capture: kernels are compiled, and the optimizer's state is made


def check_capture(config: RunConfig, method: Method, device: torch.device) -> None:
    """Raises ValueError where --cuda_graph cannot be had with the other options; says which of them to change."""
    hooks = type(method)
    obstacles = (
        (device.type != "cuda", f"the device is {device}; a graph needs a CUDA device", "--cuda_graph false"),
        (config.dtype == "float16", "float16 scales the loss, and reads whether it overflowed", "--dtype bfloat16"),
        (config.accumulate > 1, "the parts of a batch restore random states on the host", "--accumulate 1"),
        (method.joint, "batches of joint training have the prompts of one task after the other", "another --method"),
        (distils(config.method), "distillation draws its texts on the host", "--method.distillation 0"),
        (
            hooks.extra_loss is not Method.extra_loss
            or hooks.after_step not in (Method.after_step, GatedMethod.after_step),
            f"{config.method.name} does something at each step that a replay would leave out",
            "a method such as lora or codyra",
        ),
    )
    for stands, reason, instead in obstacles:
        if stands:
            raise ValueError(f"cuda_graph was asked for, and {reason}. Give {instead}, or leave cuda_graph out.")


class _Recorded(NamedTuple):
    """A captured step: the batch that it reads, the loss that it writes, and what carries it out."""

    static: Batch
    loss: Tensor
    replay: Callable[[], Any]


class GraphedStep:
    """Carries out steps as `TrainingStep` does: full batches by a replay, an epoch's short last batch as it comes.

    The first steps of a task are carried out eagerly, too, then one is captured. Replays read the batch, the learning
    rate and kappa from where they are written before each.

    Args:
        step: of the task.
        ctx: of the task.
        batch_size: images of a full batch.
        capture: records what a function does on the device, without doing it, and returns what does it.
    """

    def __init__(
        self,
        step: TrainingStep,
        ctx: TaskContext,
        batch_size: int,
        capture: Callable[[Callable[[], Any]], Callable[[], Any]] | None = None,
    ) -> None:
        self._step, self._ctx, self._batch_size = step, ctx, batch_size
        self._capture = capture or _cuda_graph
        self._full_batches = 0
        self._recorded: _Recorded | None = None

    def __call__(self, iteration: int, batch: Batch) -> Tensor:
        """Train on `batch`; the loss, 0-d, detached."""
        full = len(batch.images) == self._batch_size
        self._full_batches += full
        if not full or self._full_batches <= WARM_UP:
            return self._step(iteration, batch)
        if self._recorded is None:
            self._recorded = self._record(iteration, batch)
        static, loss, replay = self._recorded
        static.images.copy_(batch.images, non_blocking=True)
        static.labels.copy_(batch.labels, non_blocking=True)
        self._ctx.optimizer.write_scalars()
        replay()
        self._ctx.step["iteration"] = iteration
        return loss.clone()

    def _record(self, iteration: int, batch: Batch) -> _Recorded:
        static = batch._replace(images=batch.images.clone(), labels=batch.labels.clone())
        loss = torch.zeros((), device=batch.images.device)
        return _Recorded(static, loss, self._capture(lambda: loss.copy_(self._step(iteration, static))))


def _cuda_graph(work: Callable[[], Any]) -> Callable[[], Any]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
