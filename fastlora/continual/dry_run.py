"""What a run would do and need, without doing it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastlora
from fastlora.continual.features import image_features, text_features
from fastlora.continual.losses import contrastive_loss
from fastlora.continual.tables import text_table
from fastlora.continual.training_data import prompts

if TYPE_CHECKING:
    from fastlora.continual.trainer import Trainer


@dataclass(frozen=True)
class PlannedTask:
    """A task, and what is trained when it arrives; joint training trains on all of them then, at the first."""

    name: str
    classes: int
    test_images: int
    train_images: int = 0
    iterations: int = 0
    images_seen: int = 0


@dataclass(frozen=True)
class Needs:
    """What training takes. Sizes are bytes.

    Args:
        adapters: adapted modules by tower.
        parameters: number of trainable parameters.
        trained: their size; their gradients take as much.
        optimizer: its state; None where it is no Adam.
        activations: what one step on the largest batch keeps for backward, without a method's extra loss.
        teacher: the copy of the model that distillation compares with; 0 without it.
        adapter_file: a task's adapters at full rank.
    """

    adapters: dict[str, int]
    parameters: int
    trained: int
    optimizer: int | None
    activations: int
    teacher: int
    adapter_file: int


@dataclass(frozen=True)
class Plan:
    """A run before it is made. Sizes are bytes; `needs` is None where nothing is trained.

    Args:
        duplicate_classes: class name -> the tasks that share it: equal embeddings, which bound the union figures.
        weights: of the plain model. state_file: the commit point. checkpoints: all the weights that are kept.
    """

    title: str
    tasks: tuple[PlannedTask, ...]
    held_out_images: int
    duplicate_classes: dict[str, tuple[str, ...]]
    weights: int
    state_file: int
    checkpoints: int
    needs: Needs | None


def make_plan(trainer: Trainer) -> Plan:
    """The plan of what `trainer.fit()` would do. Begins the first task, takes no step, and uses up the stream."""
    stream, method, config, model = trainer.stream, trainer.method, trainer.config, trainer.model
    weights, buffers = _bytes(model.state_dict().values()), _bytes(model.buffers())
    needs, training = None, {}
    if method.trains:
        ctx, source = trainer.begin(1, stream.tasks[0])
        needs = _needs(trainer, ctx, source.batch(0).images)
        method.abandon(model)
        training = dict(enumerate(_training(trainer, source.sizes)))
    kept = [n for n in range(1, len(stream) + 1) if method.trains and config.keeps_checkpoint(n, len(stream))]
    return Plan(
        title=f"{method.config.name} on {stream.name}, seed {config.seed}, on {trainer.device}",
        tasks=tuple(
            PlannedTask(task.name, len(task.classes), len(task.test), *training.get(index, ()))
            for index, task in enumerate(stream.tasks)
        ),
        held_out_images=0 if stream.held_out is None else len(stream.held_out.test),
        duplicate_classes=stream.duplicate_classes(),
        weights=weights,
        state_file=buffers if method.journaled else weights,
        checkpoints=weights * len(kept),
        needs=needs,
    )


def _needs(trainer: Trainer, ctx: Any, images: Tensor) -> Needs:
    model, optimizer = trainer.model, ctx.optimizer
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    adapters: dict[str, int] = {}
    for name, _ in fastlora.adapters(model):
        tower = "vision" if name.startswith("visual.") else "text"
        adapters[tower] = adapters.get(tower, 0) + 1
    tokens = max((prompts(task, model, trainer.tokenizer) for task in trainer.stream.tasks), key=Tensor.numel)
    trained = _bytes(parameters)
    return Needs(
        adapters=adapters,
        parameters=sum(p.numel() for p in parameters),
        trained=trained,
        optimizer=2 * trained if isinstance(optimizer, torch.optim.Adam) else None,  # AdamW is one
        activations=saved_bytes(model, images, tokens.to(images.device)),
        teacher=_bytes(ctx.distillation.teacher.state_dict().values()) if ctx.distillation else 0,
        adapter_file=_bytes(fastlora.adapter_parameters(model)),
    )


def _training(trainer: Trainer, sizes: list[int]) -> list[tuple[int, int, int]]:
    """Training images, iterations and images seen, by task; `sizes` are those of the data that is open."""
    config, stream = trainer.method.config, trainer.stream
    iterations, batch = config.iterations, config.batch_size
    if not trainer.method.joint:
        sizes = [sizes[0], *(len(stream.open_task(index)) for index in range(1, len(stream)))]
    rows = [(images, iterations, _images_seen(images, iterations, batch)) for images in sizes]
    if trainer.method.joint:  # all of it when the first task arrives
        return [tuple(map(sum, zip(*rows)))]
    return rows


def _images_seen(images: int, iterations: int, batch: int) -> int:
    """An epoch's last batch may be short."""
    epochs, rest = divmod(iterations, -(-images // batch))
    return epochs * images + min(rest * batch, images)


def saved_bytes(model: Any, images: Tensor, tokens: Tensor) -> int:
    """What autograd keeps for the backward pass of one step, parameters not counted; computed on fake tensors.

    Args:
        images: [B, 3, H, W]. tokens: [C, L]. Their values play no part.
    """
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)  # held, so that no other storage takes its place
        return tensor

    training = model.training
    model.train()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        weights = [*model.parameters(), *model.buffers()]
        weights += [mode.from_tensor(weight) for weight in weights]  # what a view of a weight is made of
        own = {weight.untyped_storage()._cdata for weight in weights}
        pixels, texts = (mode.from_tensor(part) for part in (images, tokens))
        labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            scale = model.logit_scale.detach().exp()
            contrastive_loss(image_features(model, pixels), text_features(model, texts), labels, scale)
        sizes = [tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own]
    model.train(training)
    return sum(sizes)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def plan_text(plan: Plan) -> str:
    """Tables of the plan."""
    header = ["task", "classes", "test images", "training images", "iterations", "images seen"]
    counts = {task.name: _counts(task) for task in plan.tasks}
    totals = [sum(values) for values in zip(*counts.values())]
    rows = [[name, *(f"{count:,}" for count in row)] for name, row in [*counts.items(), ("all", totals)]]
    tested = (len(plan.tasks) + 1) * (totals[1] + plan.held_out_images)
    lines = [f"{plan.title}: the plan; nothing is trained.", "", text_table(header, rows), ""]
    lines.append(f"Evaluation: {len(plan.tasks) + 1} times, {tested:,} images in all, held-out set included.")
    shared = [f"{name} ({', '.join(tasks)})" for name, tasks in plan.duplicate_classes.items()]
    lines.append(f"Class names that tasks share: {'; '.join(shared) or 'none'}.")
    return "\n".join([*lines, "", _memory(plan), "", _disk(plan)])


def _counts(task: PlannedTask) -> list[int]:
    return [task.classes, task.test_images, task.train_images, task.iterations, task.images_seen]


def _memory(plan: Plan) -> str:
    rows = [["weights", _mib(plan.weights)]]
    needs = plan.needs
    if needs is None:
        return "Memory, MiB:\n" + text_table(["", ""], rows)
    modules = ", ".join(f"{count} in {tower}" for tower, count in needs.adapters.items()) or "none"
    rows += [["trained parameters", _mib(needs.trained)], ["their gradients", _mib(needs.trained)]]
    rows.append(["optimizer", "not known" if needs.optimizer is None else _mib(needs.optimizer)])
    rows.append(["kept for backward, largest step", _mib(needs.activations)])
    if needs.teacher:
        rows.append(["teacher of distillation", _mib(needs.teacher)])
    return f"Trainable parameters: {needs.parameters:,}. Adapters: {modules}.\n\nMemory, MiB:\n" + text_table(
        ["", ""], rows
    )


def _disk(plan: Plan) -> str:
    rows = [["commit point", _mib(plan.state_file)], ["checkpoints", _mib(plan.checkpoints)]]
    if plan.needs is not None:
        rows.insert(0, ["adapters of a task, before pruning", _mib(plan.needs.adapter_file)])
    return "On disk, MiB:\n" + text_table(["", ""], rows)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.2f}"
