"""A linear layer with a pool of rank-1 experts, of which each sample, or each token, has a few."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastlora.ops.rank_lora import rank_lora_linear


class Experts:
    """Rank-1 experts b_i a_i^T of one layer and the router that scores them; those of the newest task train.

    Attributes:
        earlier, newest: lora_a [R, K], lora_b [N, R] and router [R, K] each, float32; R = 0 before `grow`.

    Args:
        active: experts at work at a time; all of them while there are fewer.
        per: "sample" or "token", see `gates`.
    """

    def __init__(self, layer: nn.Linear, active: int, per: str) -> None:
        n, k, device = layer.out_features, layer.in_features, layer.weight.device
        self._shape, self._device = (n, k), device
        self.active, self.per = active, per
        self.earlier = self.newest = self._none()

    def _none(self) -> tuple[Tensor, Tensor, Tensor]:
        n, k = self._shape
        lora_a, lora_b, router = (torch.zeros(shape, device=self._device) for shape in ((0, k), (n, 0), (0, k)))
        return lora_a, lora_b, router

    def grow(self, rank: int, generator: torch.Generator) -> None:
        """Freeze the experts that are there, and add `rank` to be trained: lora_b 0, the others Kaiming-uniform.

        Drawn on the CPU, lora_a before router; equal rows of a router would give every sample the same experts.
        """
        n, k = self._shape
        bound = 1 / math.sqrt(k)
        lora_a, router = (torch.empty(rank, k).uniform_(-bound, bound, generator=generator) for _ in range(2))
        self.keep(*self.all())
        drawn = (lora_a, torch.zeros(n, rank), router)
        lora_a, lora_b, router = (value.to(self._device).requires_grad_() for value in drawn)
        self.newest = lora_a, lora_b, router

    def keep(self, lora_a: Tensor, lora_b: Tensor, router: Tensor) -> None:
        """Have these experts alone, frozen."""
        lora_a, lora_b, router = (value.detach().to(self._device) for value in (lora_a, lora_b, router))
        self.earlier = lora_a, lora_b, router
        self.newest = self._none()

    def shrink(self) -> None:
        """Take back the last `grow`, and what was trained since."""
        self.newest = self._none()

    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        """lora_a, lora_b and router over the experts of every task."""
        (a, b, router), (new_a, new_b, new_router) = self.earlier, self.newest
        return torch.cat((a, new_a)), torch.cat((b, new_b), 1), torch.cat((router, new_router))

    def gates(self, x: Tensor, router: Tensor) -> Tensor:
        """k * softmax over the k highest scores, 0 elsewhere: those at work have mean 1, like the gates of LoRA.

        Args:
            x: [batch, tokens, K]. router: [R, K].
        Returns:
            [batch, R] by the scores of the first token of each sample, or [batch * tokens, R] by each token's own.
        """
        rows = x[:, 0] if self.per == "sample" else x.flatten(0, 1)
        scores = nn.functional.linear(rows.to(router.dtype), router)
        k = min(self.active, len(router))
        top = scores.topk(k, dim=-1)
        return torch.zeros_like(scores).scatter(-1, top.indices, k * top.values.softmax(-1))


class PooledLinear(nn.Linear):
    """nn.Linear over the same weight and bias, plus sum_i g_i(x) b_i a_i^T x over the experts that x chooses.

    The experts are no part of the module: its state_dict is that of the linear layer, and .to() does not move them.

    Args:
        backend: as for `fastlora.ops.rank_lora_linear`.
    """

    experts: Experts

    def __init__(self, plain: nn.Linear, experts: Experts, backend: str = "auto") -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None, device="meta")
        self.weight, self.bias = plain.weight, plain.bias
        # not through nn.Module.__setattr__: the experts belong to the method, whose state_dict holds them
        self.__dict__["experts"] = experts
        self.backend = backend
        self.train(plain.training)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, tokens, K] -> [batch, tokens, N]."""
        lora_a, lora_b, router = self.experts.all()
        gate = self.experts.gates(x, router)
        return rank_lora_linear(x, self.weight, self.bias, lora_a, lora_b, gate, backend=self.backend)

    def to_linear(self) -> nn.Linear:
        """The plain layer over the same weight and bias."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        plain.weight, plain.bias = self.weight, self.bias
        return plain.train(self.training)
