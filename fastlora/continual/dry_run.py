"""What a run would do and need, without doing it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastlora.continual.memory import Needs, consumers, needs_of, size_of
from fastlora.continual.tables import text_table

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
class Plan:
    """A run before it is made. Sizes are bytes; `needs` is None where nothing is trained.

    Args:
        duplicate_classes: class name -> the tasks that share it: equal embeddings, which bound the union figures.
        weights: of the plain model. state_file: the commit point. checkpoints: all the weights that are kept.
        cached_tests: of test and reference images in data.cache_dir. cached_crops: of training there, at most.
    """

    title: str
    tasks: tuple[PlannedTask, ...]
    held_out_images: int
    duplicate_classes: dict[str, tuple[str, ...]]
    weights: int
    state_file: int
    checkpoints: int
    cached_tests: int
    cached_crops: int
    needs: Needs | None


def make_plan(trainer: Trainer) -> Plan:
    """The plan of what `trainer.fit()` would do. Begins the first task, takes no step, and uses up the stream."""
    stream, method, config, model = trainer.stream, trainer.method, trainer.config, trainer.model
    weights, buffers = size_of(model.state_dict().values()), size_of(model.buffers())
    needs, training = None, {}
    if method.trains:
        ctx, source = trainer.begin(1, stream.tasks[0])
        needs = needs_of(trainer, ctx, source.batch(0).images)
        method.abandon(model)
        training = dict(enumerate(_training(trainer, source.sizes)))
    tasks = tuple(
        PlannedTask(task.name, len(task.classes), len(task.test), *training.get(index, ()))
        for index, task in enumerate(stream.tasks)
    )
    kept = [n for n in range(1, len(stream) + 1) if method.trains and config.keeps_checkpoint(n, len(stream))]
    return Plan(
        title=f"{method.config.name} on {stream.name}, seed {config.seed}, on {trainer.device}",
        tasks=tasks,
        held_out_images=0 if stream.held_out is None else len(stream.held_out.test),
        duplicate_classes=stream.duplicate_classes(),
        weights=weights,
        state_file=buffers if method.journaled else weights,
        checkpoints=weights * len(kept),
        **_cached(trainer, sum(task.images_seen for task in tasks)),
        needs=needs,
    )


def _cached(trainer: Trainer, seen: int) -> dict[str, int]:
    """What data.cache_dir is given; 0 without one, and of data sets that are in memory."""
    tested = [task.test for task in trainer.stream.tasks]
    if trainer.stream.reference is not None and trainer.stream.reference.images is not None:
        tested.append(trainer.stream.reference.images)
    sizes: list[int] = [getattr(images, "disk_bytes", 0) for images in tested]
    return {
        "cached_tests": sum(size * len(images) for size, images in zip(sizes, tested)),
        "cached_crops": max(sizes) * seen if trainer.config.data.cache_crops else 0,
    }


def _training(trainer: Trainer, sizes: list[int]) -> list[tuple[int, int, int]]:
    """Training images, iterations and images seen, by task; `sizes` are those of the data that is open."""
    config, stream = trainer.method.config, trainer.stream
    iterations, batch = config.iterations, config.batch_size
    if not trainer.method.joint:
        sizes = [sizes[0], *(len(stream.open_task(index)) for index in range(1, len(stream)))]
    rows = [(images, iterations, _images_seen(images, iterations, batch)) for images in sizes]
    if trainer.method.joint:  # all of it when the first task arrives
        all_images, all_iterations, all_seen = map(sum, zip(*rows))
        return [(all_images, all_iterations, all_seen)]
    return rows


def _images_seen(images: int, iterations: int, batch: int) -> int:
    """An epoch's last batch may be short."""
    epochs, rest = divmod(iterations, -(-images // batch))
    return epochs * images + min(rest * batch, images)


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
    needs = plan.needs
    rows = [[what, _mib(size)] for what, size in consumers(plan.weights, needs).items()]
    if needs is None:
        return "Memory, MiB:\n" + text_table(["", ""], rows)
    if needs.optimizer is None:
        rows.append(["optimizer", "not known"])
    modules = ", ".join(f"{count} in {tower}" for tower, count in needs.adapters.items()) or "none"
    return f"Trainable parameters: {needs.parameters:,}. Adapters: {modules}.\n\nMemory, MiB:\n" + text_table(
        ["", ""], rows
    )


def _disk(plan: Plan) -> str:
    rows = [["commit point", _mib(plan.state_file)], ["checkpoints", _mib(plan.checkpoints)]]
    if plan.needs is not None:
        rows.insert(0, ["adapters of a task, before pruning", _mib(plan.needs.adapter_file)])
    cached = {"test and reference images": plan.cached_tests, "training crops, at most": plan.cached_crops}
    rows += [[f"in data.cache_dir: {what}", _mib(size)] for what, size in cached.items() if size]
    return "On disk, MiB:\n" + text_table(["", ""], rows)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.2f}"
