"""One adapter per task and a test that knows the task: the upper bound on what is kept."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fastlora
from fastlora.adapt import RankReport
from fastlora.adapter_file import adapter_tensors, read_adapter
from fastlora.continual.configs.bounds import PerTaskConfig
from fastlora.continual.methods.base import TaskContext
from fastlora.continual.methods.lora import LoRA
from fastlora.continual.methods.weights import other_weights
from fastlora.journal import Journal


class PerTask(LoRA):
    """LoRA (arXiv 2106.09685) of each task on the base model, which stays as it is; no adapter is on another's.

    No paper of its own: the upper bound with known task identity. A data set is tested with its own adapter merged into
    the base model, in both label spaces; data sets without one, and the held-out set, with the base model. Each adapter
    is a file of the journal, of which `journal.rebuild(base, tasks=[t])` makes the model of data set t bit for bit;
    merging one after the other would give a model that no figure belongs to.
    """

    config_class = PerTaskConfig
    journaled = False
    per_dataset = True

    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__(config, **options)
        self.learned: dict[int, dict[str, Tensor]] = {}  # task, from 1 -> its adapters by the keys of an adapter file

    def end_task(self, ctx: TaskContext) -> RankReport:
        self.scale(ctx.model)
        report = fastlora.rank_report(ctx.model)
        if ctx.journal is not None:
            ctx.journal.append(ctx.model, ctx.task.name)
        self.learned[ctx.number] = {key: tensor.clone() for key, tensor in adapter_tensors(ctx.model).items()}
        fastlora.remove(ctx.model)
        return report

    @contextlib.contextmanager
    def evaluation_model(self, model: nn.Module, index: int) -> Iterator[nn.Module]:
        if index + 1 not in self.learned:
            yield model
            return
        with other_weights(model, {}):  # back to its own afterwards
            try:
                self._merge(model, self.learned[index + 1])
                yield model
            finally:
                fastlora.remove(model)

    @torch.no_grad()
    def _merge(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        config = self.config
        fastlora.inject(
            model, config.rank, targets=config.targets, where=config.where, gate_init="ones", backend=self.backend
        )
        for key, parameter in adapter_tensors(model).items():
            parameter.copy_(tensors[key])
        fastlora.merge(model)
        fastlora.remove(model)

    def rebuild(self, model: nn.Module, journal: Journal, task: int) -> str:
        entries = itertools.islice(journal, task)
        self.learned = {entry.number: read_adapter(entry.path).tensors for entry in entries}
        return f"the base model and {task} adapter files"

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{number}.{key}": tensor for number, own in self.learned.items() for key, tensor in own.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.learned = {}
        for key, tensor in state.items():
            number, _, rest = key.partition(".")
            self.learned.setdefault(int(number), {})[rest] = tensor
