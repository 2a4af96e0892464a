"""Options of sequential LoRA, and of the methods that act on its rank-1 components."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastlora.continual.configs.base import AdapterConfig, check_count, check_number, check_one_of


@dataclass(frozen=True)
class LoRAConfig(AdapterConfig):
    """Plain LoRA, one adapter per task, merged at the end of the task. Every gate is 1 and frozen."""

    name: ClassVar[str] = "lora"


@dataclass(frozen=True)
class CoDyRAConfig(AdapterConfig):
    """CoDyRA (arXiv 2412.01004): one gate per rank, a proximal step that removes ranks, one merge per task.

    The defaults are the published ones for ViT-B/16.

    Args:
        kappa_max: last and largest threshold, in gate units (not multiplied by lr). 0 never prunes.
        kappa_steps: number of values of the ramp from 0 to kappa_max.
        dense: share of the task before the ramp starts, without any threshold.
        prox: exact (the paper's equation) or released (the published code: everything below 2 kappa dies).
        gate_init: normal (N(0, 1), as published) or ones.
        drop_dead: remove ranks during the task once their gates cannot leave 0 again; the result is the same, sooner.
    """

    name: ClassVar[str] = "codyra"
    kappa_max: float = 0.005
    kappa_steps: int = 50
    dense: float = 0.5
    prox: str = "exact"
    gate_init: str = "normal"
    drop_dead: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("kappa_max", self.kappa_max, ">= 0", lambda v: v >= 0.0, "Give a threshold such as 0.005.")
        check_count("kappa_steps", self.kappa_steps, "Give the number of values of the ramp, 50 in the paper.", least=2)
        check_number("dense", self.dense, "in [0, 1]", lambda v: 0.0 <= v <= 1.0, "Give a share, 0.5 in the paper.")
        check_one_of("prox", self.prox, ("exact", "released"))
        check_one_of("gate_init", self.gate_init, ("normal", "ones"))
        if not isinstance(self.drop_dead, bool):
            raise ValueError(f"drop_dead is {self.drop_dead!r}; it must be true or false.")
