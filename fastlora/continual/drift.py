"""How far the weights of a model have moved."""

from __future__ import annotations

from torch import nn


class Drift:
    """Remembers the parameters of a plain model, on the CPU, to tell the distance from them later.

    Attributes:
        start: the remembered parameters by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.start = {name: value.detach().cpu().clone() for name, value in model.named_parameters()}

    def norm(self, model: nn.Module) -> float:
        """||theta - theta_0||_F over all parameters that the model started with, summed in float64."""
        now = dict(model.named_parameters())
        return sum(
            float((now[name].detach().cpu().double() - start.double()).square().sum())
            for name, start in self.start.items()
        ) ** 0.5  # fmt: skip
