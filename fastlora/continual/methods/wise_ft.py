"""WiSE-FT: interpolation in weight space between a fine-tuned model and the one it came from."""

from __future__ import annotations

from fastlora.continual.configs.full import WiSEFTConfig
from fastlora.continual.methods.base import TaskContext
from fastlora.continual.methods.full import FullFineTuning
from fastlora.continual.methods.weights import interpolate_


class WiSEFT(FullFineTuning):
    """theta <- (1 - alpha) theta_anchor + alpha theta after every task (WiSE-FT, arXiv 2109.01903, Eq. 1).

    The paper fine-tunes once and interpolates with the zero-shot weights: anchor "zero_shot". Over a stream this also
    takes a share 1 - alpha out of all that earlier tasks have learned. ZSCL (arXiv 2303.06628) lists WiSE-FT on MTIL;
    its published script interpolates with the weights before the task, alpha 0.8: anchor "previous", which is full
    fine-tuning with merge_scale alpha. Simplified: alpha is given, not chosen; both towers are interpolated, and there
    is no classifier head.
    """

    config_class = WiSEFTConfig

    def end_task(self, ctx: TaskContext) -> None:
        anchor = self.before if self.config.anchor == "previous" else ctx.base
        interpolate_(self.trained, anchor, self.config.alpha)
        super().end_task(ctx)
