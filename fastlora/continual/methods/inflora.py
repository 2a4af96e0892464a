"""InfLoRA: interference-free low-rank adaptation (arXiv 2404.00228)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import fastlora
from fastlora.adapt import RankReport
from fastlora.continual.configs.subspaces import InfLoRAConfig
from fastlora.continual.layer_inputs import input_moments, input_of
from fastlora.continual.low_rank import smallest_rank
from fastlora.continual.methods.base import TaskContext
from fastlora.continual.methods.lora import LoRA

# of the energy: sums in float32 leave no direction quite empty
_NOISE = 1e-6


class InfLoRA(LoRA):
    """delta W = B_t A_t with A_t frozen: the top right-singular directions of H_t (I - M M^T), over sqrt(3).

    H_t: the inputs that the layer sees on the images and prompts of task t, before training (section 3.2).
    M: an orthonormal basis of the inputs of the earlier tasks, seen after training on each. So A_t x is about 0 for
    their inputs, and they keep their outputs whatever B_t learns. After each task M grows by the fewest directions
    that bring the share of the energy of the inputs that it holds to the threshold (as gradient projection memory, GPM, does).

    The paper's DualGPM keeps whichever of M and its complement is smaller: the same subspace, kept here as M alone. Its
    released code takes shares of the squared eigenvalues of H^T H, which is looser; here, as in the text, of ||H||_F^2. Its
    threshold grows linearly over a number of tasks that is known beforehand, here by a step at every task. It adapts k and
    v; here every target, and both towers.
    """

    config_class = InfLoRAConfig

    def __init__(self, config: InfLoRAConfig, **options: str) -> None:
        super().__init__(config, **options)
        self.bases: dict[str, Tensor] = {}  # by layer input (q, k and v share one): M, [K, d]

    def inject(self, ctx: TaskContext) -> None:
        super().inject(ctx)  # lora_b is 0: the inputs are those of the plain model
        moments = input_moments(ctx, self.config.batch_size)
        designs = {
            host: design(moment, self._basis(host, moment), self.config.rank) for host, moment in moments.items()
        }
        for name, adapter in fastlora.adapters(ctx.model):
            rows = designs[input_of(name, adapter)]
            adapter.keep_ranks_(torch.arange(len(rows), device=adapter.gate.device))
            with torch.no_grad():
                adapter.lora_a.copy_(rows / math.sqrt(3))

    def choose_trainable(self, model: nn.Module) -> None:
        super().choose_trainable(model)
        for _, adapter in fastlora.adapters(model):
            adapter.lora_a.requires_grad_(False)

    def end_task(self, ctx: TaskContext) -> RankReport:
        config = self.config
        share = min(1.0, config.energy + config.energy_step * (ctx.number - 1))
        moments = input_moments(ctx, config.batch_size)
        bases = {host: extend(self._basis(host, moment), moment, share) for host, moment in moments.items()}
        report = super().end_task(ctx)
        self.bases = bases
        return report

    def _basis(self, host: str, moment: Tensor) -> Tensor:
        return self.bases[host].to(moment.device) if self.bases else moment.new_zeros(len(moment), 0)

    def state_dict(self) -> dict[str, Tensor]:
        """Bases of the inputs of the earlier tasks, by layer: directions of features, no image."""
        return {host: basis.cpu() for host, basis in self.bases.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.bases = dict(state)


def design(moment: Tensor, basis: Tensor, rank: int) -> Tensor:
    """The top right-singular directions of the inputs off the old subspace: orthonormal rows, [at most rank, K] float64.

    Args:
        moment: [K, K], sum of x x^T over the inputs.
        basis: [K, d], orthonormal columns that span the old subspace.
    Returns:
        Fewer than `rank` rows where fewer directions are left: none of them may be one of the old.
    """
    energies, directions = _off(moment, basis)
    return directions[:, : min(rank, int(torch.count_nonzero(energies)))].t()


def extend(basis: Tensor, moment: Tensor, share: float) -> Tensor:
    """`basis` with the fewest directions added that let it hold `share` of the energy of the inputs; [K, d'] float32."""
    energies, directions = _off(moment, basis)
    total = moment.double().trace()
    missing = energies.sum() - (1 - share) * total
    if not bool(missing > 0):
        return basis
    added = min(smallest_rank(energies, float(missing / energies.sum())), len(basis) - basis.shape[1])
    # orthonormal again: float32 columns are orthogonal to 1e-7 only
    return torch.linalg.qr(torch.cat([basis.double(), directions[:, :added]], 1))[0].float().contiguous()


def _off(moment: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Energies [K], falling, and directions [K, K] of the inputs after their part in the span of `basis` is taken out."""
    m = torch.linalg.qr(basis.double())[0]
    projected = moment.double() - m @ (m.t() @ moment.double())
    projected = projected - (projected @ m) @ m.t()
    energies, directions = torch.linalg.eigh((projected + projected.t()) / 2)
    energies, directions = energies.flip(0), directions.flip(1)
    return energies.where(energies > _NOISE * moment.double().trace(), 0.0), directions
