"""Sequential LoRA: what CoDyRA is compared with."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from fastlora.continual.configs.base import AdapterConfig
from fastlora.continual.configs.gated import LoRAConfig
from fastlora.continual.methods.base import AdapterMethod
from fastlora.continual.methods.components import freeze_gates


class LoRA(AdapterMethod):
    """LoRA (arXiv 2106.09685), merged after each task: delta W = B A, every gate 1 and frozen, no proximal step.

    Optimizer, schedule, loss, targets and merge are those of CoDyRA, so that the gates are the only difference. The
    scaling alpha / r is 1.
    """

    config_class: ClassVar[type[AdapterConfig]] = LoRAConfig
    gate_init = "ones"

    def choose_trainable(self, model: nn.Module) -> None:
        freeze_gates(model)
