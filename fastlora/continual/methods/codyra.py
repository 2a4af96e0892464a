"""CoDyRA: rank minimisation per task by a proximal step on the gates (arXiv 2412.01004)."""

from __future__ import annotations

import math
from typing import Any

from fastlora.continual.annealing import cosine
from fastlora.continual.configs.gated import CoDyRAConfig
from fastlora.continual.methods.base import AdapterMethod, TaskContext
from fastlora.optim import KappaSchedule

# times per task that dead ranks are dropped: each waits for the device and changes the shapes that kernels see
DROPS = 5


class CoDyRA(AdapterMethod):
    """delta W = sum_i w_i B[:, i] A[i, :];  w <- T_kappa(w - AdamW step), with kappa(t) from KappaSchedule.

    Per task: A Kaiming-uniform, B 0, w ~ N(0, 1); the first half dense, then kappa rises to kappa_max; at the end the
    components with w = 0 are dropped, the rest merged, and the next task starts from a fresh adapter. From the iteration
    on where a gate at 0 stays there, dead components are dropped during the task, too.
    """

    config_class = CoDyRAConfig

    def __init__(self, config: CoDyRAConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self.prox, self.gate_init = config.prox, config.gate_init
        self.schedule = KappaSchedule(config.kappa_max, config.kappa_steps, config.dense, config.iterations)

        self.drops = self._drops() if config.drop_dead else frozenset()

    def _drops(self) -> frozenset[int]:
        """Iterations before which dead ranks are dropped: the first that is exact, and a few more up to the end."""
        total = self.config.iterations
        first = self.schedule.exact_from(lambda iteration: cosine(self.config.lr, iteration, total))
        return frozenset(range(first, total, max(1, math.ceil((total - first) / DROPS))))

    def kappa(self, iteration: int) -> float:
        return self.schedule.kappa(iteration)

    def after_step(self, ctx: TaskContext) -> None:
        if ctx.step["iteration"] + 1 in self.drops:
            ctx.optimizer.drop_dead_ranks_(ctx.model)

    def null_model(self) -> dict[str, float]:
        """What is kept when no gate ever sees a gradient, so that data cannot be credited with it.

        A gate survives when it starts above the sum of all thresholds; with the released operator, whose dead zone is
        twice the threshold, above that sum plus the last threshold.
        """
        shrink = self.schedule.total_shrink
        reach = shrink + (self.config.kappa_max if self.prox == "released" and shrink > 0 else 0.0)
        survival = math.erfc(reach / math.sqrt(2)) if self.gate_init == "normal" else float(reach < 1.0)
        return {"total_shrink": shrink, "survival": survival, "expected_rank": survival * self.config.rank}
