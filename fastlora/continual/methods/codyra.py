"""CoDyRA: rank minimisation per task by a proximal step on the gates (arXiv 2412.01004)."""

from __future__ import annotations

import math
from typing import Any

from fastlora.continual.config import CoDyRAConfig
from fastlora.continual.methods.base import AdapterMethod
from fastlora.optim import KappaSchedule


class CoDyRA(AdapterMethod):
    """delta W = sum_i w_i B[:, i] A[i, :];  w <- T_kappa(w - AdamW step), with kappa(t) from KappaSchedule.

    Per task: A Kaiming-uniform, B 0, w ~ N(0, 1); the first half dense, then kappa rises to kappa_max; at the end the
    components with w = 0 are dropped, the rest merged, and the next task starts from a fresh adapter.
    """

    config_class = CoDyRAConfig

    def __init__(self, config: CoDyRAConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self.prox, self.gate_init = config.prox, config.gate_init
        self.schedule = KappaSchedule(config.kappa_max, config.kappa_steps, config.dense, config.iterations)

    def kappa(self, iteration: int) -> float:
        return self.schedule.kappa(iteration)

    def null_model(self) -> dict[str, float]:
        """What is kept when no gate ever sees a gradient, so that data cannot be credited with it.

        A gate survives when it starts above the sum of all thresholds; with the released operator, whose dead zone is
        twice the threshold, above that sum plus the last threshold.
        """
        shrink = self.schedule.total_shrink
        reach = shrink + (self.config.kappa_max if self.prox == "released" and shrink > 0 else 0.0)
        survival = math.erfc(reach / math.sqrt(2)) if self.gate_init == "normal" else float(reach < 1.0)
        return {"total_shrink": shrink, "survival": survival, "expected_rank": survival * self.config.rank}
