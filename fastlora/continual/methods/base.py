"""What a method is to the trainer: a few hooks; and the adapter life cycle that most methods share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import fastlora
from fastlora.adapt import RankReport
from fastlora.continual.batches import generator_for
from fastlora.continual.config import MethodConfig
from fastlora.continual.configs.base import AdapterConfig
from fastlora.continual.distributed import ALONE, World
from fastlora.continual.stream import MapStyle, Reference, Task, TaskStream
from fastlora.journal import Journal
from fastlora.optim import ProxAdamW


@dataclass
class TaskContext:
    """What the hooks of one task see. `begin_task` sets the optimizer; the trainer refreshes `step` before each hook.

    Args:
        model: the model in training; the plain merged one before begin_task and after end_task.
        task: the current task, without its training data.
        number: 1 for the first task.
        seed: of the run.
        seen_classes: number of classes of the earlier tasks.
        journal: takes the task's adapters; None when nothing is kept.
        optimizer: steps and anneals; the lr of each of its groups is the one at the first step of the task.
        step: iteration (from 0), labels, image_features, text_features and loss of the step in work; images, where
            several processes train those of this one alone (`world.gather` brings together what is computed from them).
        earlier: the tasks before this one (names, classes and templates; their training data is gone).
        train: training data of the current task, for methods that look at it before the first step.
        reference: the stream's images and texts of no task; None where it has none.
        tokenizer: list of texts -> [n, context] integers.
        device: of the model.
        base: parameters of the model before the first task by name, on the CPU; not to be written to.
        distillation: the loss of config.distillation; None where that is 0.
        fixed_shapes: adapters keep their shapes during the task, whatever dies; see RunConfig.fixes_shapes.
        world: the processes that train together. What a hook does, all do alike, and gradients are averaged over them.
    """

    model: nn.Module
    task: Task
    number: int
    seed: int
    seen_classes: int
    journal: Journal | None = None
    optimizer: Any = None
    step: dict[str, Any] = field(default_factory=dict)
    earlier: tuple[Task, ...] = ()
    train: MapStyle | None = None
    reference: Reference | None = None
    tokenizer: Any = None
    device: torch.device = torch.device("cpu")
    base: Mapping[str, Tensor] = field(default_factory=dict)
    distillation: Any = None
    fixed_shapes: bool = False
    world: World = ALONE


class Method:
    """A method that does not train. `config_class` names its options; subclasses override hooks.

    Attributes:
        trains: whether there is anything to train.
        joint: trains on the data of all tasks at once, in place of the first task; nothing is trained after it.
        journaled: the model after a task follows from the base model and the adapters in the journal. Where it does
            not, a run keeps the weights.
        beside_weights: what was learned stays beside the weights, in `state_dict`; `attach` puts it into a plain model.
        adapters_alone: trains adapters over frozen weights.
        per_dataset: `evaluation_model` gives other models to other data sets.
        selects: of the components that a task starts with, `end_task` merges a choice.
        draws: what that choice hangs on that is drawn at random: gates, choice, or nothing.
    """

    config_class: ClassVar[type[MethodConfig]] = MethodConfig
    trains: ClassVar[bool] = False
    joint: ClassVar[bool] = False
    journaled: bool = True
    beside_weights: ClassVar[bool] = False
    adapters_alone: bool = True
    per_dataset: ClassVar[bool] = False
    selects: ClassVar[bool] = False

    def __init__(self, config: Any, *, backend: str = "auto") -> None:
        if not isinstance(config, self.config_class):
            raise TypeError(
                f"config is a {type(config).__name__}; {type(self).__name__} takes a {self.config_class.__name__}. "
                "Build that one, or look the method up by its config's name in METHODS."
            )
        self.config: Any = config
        self.backend = backend

    @property
    def draws(self) -> str:
        return ""

    def check(self, stream: TaskStream) -> None:
        """Raises ValueError where the stream lacks what the method needs; called before anything is computed."""

    def begin_task(self, ctx: TaskContext) -> None:
        """Before the first step: make the model trainable and set ctx.optimizer."""

    def kappa(self, iteration: int) -> float | None:
        """Threshold of the proximal step after the optimizer step of `iteration` (from 0); None without such a step."""
        return None

    def extra_loss(self, ctx: TaskContext) -> Tensor | None:
        """A 0-d term that is added to the loss of a step, or None."""
        return None

    def after_step(self, ctx: TaskContext) -> None:
        """After the optimizer step (and its proximal step) of every iteration."""

    def end_task(self, ctx: TaskContext) -> RankReport | None:
        """After the last step: leave a plain model with what was learned in its weights; the ranks that it took."""
        return None

    def active_rank(self, model: nn.Module) -> float | None:
        """Mean number of live components per module, for the log; None without adapters. Waits for the device once."""
        return None

    def null_model(self) -> dict[str, float] | None:
        """total_shrink, survival, expected_rank of gates that see no gradient; None for methods that prune nothing."""
        return None

    def abandon(self, model: nn.Module) -> None:
        """A task was cut short: leave the plain model as it was before the task."""

    def rebuild(self, model: nn.Module, journal: Journal, task: int) -> str:
        """Bring the base model to the state after `task` (from 1) of a run, by the run's journal.

        Returns:
            What was read, in words.
        Raises:
            FileNotFoundError: the journal does not tell.
        """
        if not self.journaled:
            raise FileNotFoundError(
                f"{self.config.name} leaves no adapters to rebuild the model after task {task} from, and its weights were "
                "not kept. Train with --checkpoints all to keep those after every task."
            )
        journal.rebuild(model, after=task)
        return f"{task} adapter files"

    def state_dict(self) -> dict[str, Tensor]:
        """What later tasks need beside the model: nothing of the images, so that no old data hides in a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave after the last finished task."""

    def attach(self, model: nn.Module) -> None:
        """Put what `load_state_dict` took back into a plain model, where it does not go into the weights."""

    @contextlib.contextmanager
    def evaluation_model(self, model: nn.Module, index: int) -> Iterator[nn.Module]:
        """The model that data set `index` (from 0) is tested with; `model` itself unless `per_dataset`."""
        yield model


class AdapterMethod(Method):
    """One fresh adapter per task in every target, merged at the end of the task.

    Between tasks the model is the plain one: what is evaluated and saved is what a user gets, without any adapter.
    """

    config_class = AdapterConfig
    trains = True
    prox = "exact"
    gate_init = "normal"
    scaling = 1.0

    def begin_task(self, ctx: TaskContext) -> None:
        self.inject(ctx)
        self.choose_trainable(ctx.model)
        ctx.optimizer = self.optimizer(ctx.model)

    def inject(self, ctx: TaskContext) -> None:
        """Adapters into the plain model."""
        config = self.config
        fastlora.inject(
            ctx.model,
            config.rank,
            targets=config.targets,
            where=config.where,
            gate_init=self.gate_init,
            scaling=self.scaling,
            backend=self.backend,
        )
        self.draw(ctx)

    def draw(self, ctx: TaskContext) -> None:
        """Fresh contents of every adapter, from the stream of ctx.seed and the task."""
        generator = generator_for(ctx.seed, "adapters", ctx.number)
        for _, adapter in fastlora.adapters(ctx.model):
            adapter.reset_adapter_(generator)

    def choose_trainable(self, model: nn.Module) -> None:
        """Freeze what this method does not train; all of lora_a, lora_b and gate train by default."""

    def optimizer(self, model: nn.Module) -> ProxAdamW:
        return ProxAdamW(model, lr=self.config.lr, operator=self.prox)

    def kappa(self, iteration: int) -> float | None:
        return 0.0

    def drop_dead(self, ctx: TaskContext) -> None:
        """Take components whose gate is 0 to stay out of the model and its optimizer: no result changes, steps cost less.

        Waits for the device. Does nothing where shapes are fixed.
        """
        if ctx.fixed_shapes:
            return
        ctx.optimizer.drop_dead_ranks_(ctx.model)

    def end_task(self, ctx: TaskContext) -> RankReport:
        self.scale(ctx.model)
        report = fastlora.rank_report(ctx.model)
        fastlora.prune(ctx.model)
        if ctx.journal is not None:
            # the pruned adapters beside the untouched base rebuild the model after any task
            ctx.journal.append(ctx.model, ctx.task.name)
        fastlora.merge(ctx.model)
        fastlora.remove(ctx.model)
        return report

    @torch.no_grad()
    def scale(self, model: nn.Module) -> None:
        """merge_scale acts on lora_b, so that the journal holds what is merged."""
        if self.config.merge_scale != 1.0:
            for _, adapter in fastlora.adapters(model):
                adapter.lora_b.mul_(self.config.merge_scale)

    def active_rank(self, model: nn.Module) -> float:
        gates = [adapter.gate.detach() for _, adapter in fastlora.adapters(model)]
        return int(torch.count_nonzero(torch.cat(gates))) / len(gates)

    def abandon(self, model: nn.Module) -> None:
        fastlora.remove(model)
