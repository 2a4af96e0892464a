"""Contribution prox: a threshold on what a component contributes, and not on its gate alone."""

from __future__ import annotations

from typing import Any

from fastlora.continual.configs.rules import ContributionProxConfig
from fastlora.continual.methods.base import TaskContext
from fastlora.continual.methods.components import SHRINK_FROM, evenly, threshold_contributions_
from fastlora.continual.methods.uniform_shrink import ShrinkingLoRA


class ContributionProx(ShrinkingLoRA):
    """b_i <- b_i max(0, 1 - kappa_t / c_i) after every step; a component that reaches 0 stays dead.

    The group soft threshold, so the proximal step of kappa_t ||.||_F (Yuan & Lin 2006), of each rank-1 term
    w_i b_i a_i. Simplified: it acts on b_i with a_i held, beside an Adam step that is not the proximal metric's. Under
    Adam ||b_i|| grows with the square root of the output width, so wide modules lose a smaller share.
    """

    config_class = ContributionProxConfig
    selects = True

    def __init__(self, config: ContributionProxConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self.drops = evenly(int(SHRINK_FROM * config.iterations) + 1, config.iterations)

    def after_step(self, ctx: TaskContext) -> None:
        kappa = self.threshold(ctx)
        if kappa > 0:
            threshold_contributions_(ctx.model, kappa)
            if ctx.step["iteration"] + 1 in self.drops:
                self.drop_dead(ctx)
