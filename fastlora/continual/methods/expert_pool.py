"""A pool of rank-1 experts in each layer, composed anew for each input (arXiv 2601.22828)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

import fastlora
from fastlora.adapt import RankReport, RankRow
from fastlora.continual.batches import generator_for
from fastlora.continual.configs.subspaces import ExpertPoolConfig
from fastlora.continual.expert_pool import Experts, PooledLinear
from fastlora.continual.methods.base import Method, TaskContext
from fastlora.ops.backend import TRITON_MAX_RANK

_KEYS = ("lora_a", "lora_b", "router")


class ExpertPool(Method):
    """y = W x + sum over i in top-k(x) of g_i(x) b_i a_i^T x, over a pool that grows by R experts a task in each layer.

    A linear router scores the experts. With per="sample" it reads the first token of the layer's input, so a sample has
    the same k experts at all its tokens. In the vision tower that is [CLS]; in the text tower no word of the prompt reaches
    it, so all prompts share their experts, and a later task may train none there. With per="token", the default, each
    token chooses its own, as in MoRAM (arXiv 2506.21035). The gates are a softmax over the chosen scores: the gradient
    reaches the chosen experts and their scores alone. The paper's released code makes one choice for a whole batch with
    gates of 1, which trains no router.

    Simplified: the paper trains a pool a task, adds a loss that keeps the pools' most used experts orthogonal, and merges
    those. Here, as in MoRAM, the experts and router rows of earlier tasks stay, frozen, among those that an input
    chooses from; nothing is merged, so a test input is routed as a training input is, and the model keeps its pool
    between tasks. (One pool that trains on through all tasks forgets more than plain LoRA.)

    The pool belongs to this object: the model's state_dict is that of the plain model, whose weights never change, and
    `state_dict()` is the pool. `attach(model)` puts a pool that was loaded into a plain model.
    """

    config_class = ExpertPoolConfig
    trains = True
    journaled = False
    beside_weights = True

    def __init__(self, config: ExpertPoolConfig, **options: str) -> None:
        super().__init__(config, **options)
        self.pool: dict[str, Experts] = {}
        self._state: dict[str, Tensor] = {}  # loaded, until a model shows which layers it is for
        self._in_task = False

    def begin_task(self, ctx: TaskContext) -> None:
        config = self.config
        if config.rank * ctx.number > TRITON_MAX_RANK:
            raise ValueError(
                f"task {ctx.number} brings the pool of a layer to {config.rank * ctx.number} experts; {TRITON_MAX_RANK} "
                f"is the most, and every task adds {config.rank}. Lower rank, or give fewer tasks."
            )
        ctx.model.requires_grad_(False)
        if not self.pool:
            self.attach(ctx.model)
        self._in_task = True
        generator = generator_for(ctx.seed, "adapters", ctx.number)
        for experts in self.pool.values():
            experts.grow(config.rank, generator)
        newest = [tensor for experts in self.pool.values() for tensor in experts.newest]
        ctx.optimizer = torch.optim.AdamW(newest, lr=config.lr, betas=(0.9, 0.9999), weight_decay=0.0)

    def attach(self, model: nn.Module) -> None:
        """Put the pool that was loaded into a plain model; an empty one, which changes nothing, where none was."""
        config = self.config
        names = fastlora.inject(model, 1, targets=config.targets, where=config.where).names
        fastlora.remove(model)
        for name in names:
            plain = cast(nn.Linear, model.get_submodule(name))
            experts = self.pool[name] = Experts(plain, config.active, config.per)
            if self._state:
                experts.keep(*(self._state[f"{name}.{key}"] for key in _KEYS))
            model.set_submodule(name, PooledLinear(plain, experts, self.backend))
        self._state = {}

    @torch.no_grad()
    def end_task(self, ctx: TaskContext) -> RankReport:
        self._in_task = False
        rows = []
        for name, experts in self.pool.items():
            lora_a, lora_b, _ = experts.newest
            held, norm = len(experts.all()[0]), float((lora_b @ lora_a).norm())
            rows.append(RankRow(name, held, min(self.config.active, held), norm))
        return RankReport(tuple(rows))

    def active_rank(self, model: nn.Module) -> float:
        held = [len(experts.all()[0]) for experts in self.pool.values()]
        return sum(min(self.config.active, n) for n in held) / len(held)

    def abandon(self, model: nn.Module) -> None:
        if not self._in_task:
            return
        self._in_task = False
        for name, experts in list(self.pool.items()):
            experts.shrink()
            if not len(experts.all()[0]):  # in the first task there was no pool before
                model.set_submodule(name, cast(PooledLinear, model.get_submodule(name)).to_linear())
                del self.pool[name]

    def state_dict(self) -> dict[str, Tensor]:
        """lora_a, lora_b and router of every layer, over the experts of all tasks."""
        named = ((name, zip(_KEYS, experts.all())) for name, experts in self.pool.items())
        return {f"{name}.{key}": value.detach().cpu() for name, tensors in named for key, value in tensors}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Kept until the first `begin_task` or `attach`."""
        self._state = dict(state)
