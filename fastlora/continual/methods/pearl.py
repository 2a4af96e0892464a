"""PEARL: the rank of every layer from how the task would move it (arXiv 2505.11998)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import fastlora
from fastlora.base_weights import host_of
from fastlora.continual.batches import batches
from fastlora.continual.configs.subspaces import PEARLConfig
from fastlora.continual.device import to_device
from fastlora.continual.features import image_features, logit_scale, text_features
from fastlora.continual.losses import contrastive_loss
from fastlora.continual.low_rank import smallest_rank
from fastlora.continual.methods.base import TaskContext
from fastlora.continual.methods.lora import LoRA
from fastlora.continual.training_data import prompts

PACKED = ("q", "k", "v")  # row blocks of in_proj_weight


class PEARL(LoRA):
    """LoRA whose rank differs by layer: the smallest that holds a share of the energy of the layer's task vector.

        tau = W_brief - W_reference = U S V^T,   rank = min k: sum_(i <= k) S_i^2 >= energy sum_i S_i^2

    W_reference, the paper's reference task weights: here the weights before the task, those of pretraining with the
    earlier tasks merged. W_brief: the same after a brief fine-tuning of the full matrices, which is then undone.
    Simplified: that fine-tuning is gradient descent of a bounded step length (Adam's equal steps in every entry give
    nearly flat spectra), only the adapted matrices move, `rank` bounds the ranks, and adapters are merged after their
    task.
    """

    config_class = PEARLConfig

    def inject(self, ctx: TaskContext) -> None:
        super().inject(ctx)
        names = [name for name, _ in fastlora.adapters(ctx.model)]
        fastlora.remove(ctx.model)
        ranks = {name: self.planned_rank(tau) for name, tau in self.task_vectors(ctx, names).items()}
        super().inject(ctx)
        for name, adapter in fastlora.adapters(ctx.model):
            adapter.keep_ranks_(torch.arange(ranks[name], device=adapter.gate.device))

    def planned_rank(self, tau: Tensor) -> int:
        """1 to config.rank for a task vector [N, K]."""
        energies = torch.linalg.svdvals(tau.double()).square()
        return min(self.config.rank, max(1, smallest_rank(energies, self.config.energy)))

    def task_vectors(self, ctx: TaskContext, names: list[str]) -> dict[str, Tensor]:
        """Layer -> tau, [N, K], of a brief fine-tuning of the plain model, whose weights are then as before.

        Raises:
            FloatingPointError: a task vector is not finite.
        """
        weights = dict(ctx.model.named_parameters())
        hosts = {name: host_of(weights, name, type(ctx.model).__name__) for name in names}
        start = {host: weights[host].detach().clone() for host in hosts.values()}
        with _trained_for_now(ctx.model, {host: weights[host] for host in start}, start):
            self._fine_tune(ctx, [weights[host] for host in start])
            taus = {host: weights[host].detach() - before for host, before in start.items()}
        if not all(bool(torch.isfinite(tau).all()) for tau in taus.values()):
            raise FloatingPointError(
                f"the brief fine-tuning on {ctx.task.name!r} is not finite, so no rank follows from it. Lower "
                f"reference_lr ({self.config.reference_lr:g}) or look at the images."
            )
        return {name: _own_rows(taus[host], name, host) for name, host in hosts.items()}

    def _fine_tune(self, ctx: TaskContext, weights: list[nn.Parameter]) -> None:
        model, config = ctx.model, self.config
        assert ctx.train is not None
        optimizer = torch.optim.SGD(weights, lr=config.reference_lr)
        tokens = prompts(ctx.task, model, ctx.tokenizer).to(ctx.device)
        scale = logit_scale(model)
        steps = zip(range(config.reference_iterations), batches(ctx.train, config.batch_size, ctx.seed, ctx.number))
        for _, (images, labels) in steps:
            features = image_features(model, to_device(images, ctx.device)), text_features(model, tokens)
            loss = contrastive_loss(*features, to_device(labels, ctx.device), scale, ctx.seen_classes)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()


@contextlib.contextmanager
def _trained_for_now(model: nn.Module, weights: dict[str, nn.Parameter], start: dict[str, Tensor]) -> Iterator[None]:
    """`weights` train inside; afterwards, whatever happens, they are as at the start, and frozen."""
    training = model.training
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        model.train()
        yield
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(False)
            weight.grad = None
            weight.copy_(start[name])
        model.train(training)


def _own_rows(tau: Tensor, name: str, host: str) -> Tensor:
    """Of a packed projection, the rows of q, k or v."""
    if host.rpartition(".")[2] == "weight":
        return tau
    return tau.chunk(len(PACKED))[PACKED.index(name.rpartition(".")[2])]
