"""Options of sequential LoRA, and of the methods that give its rank-1 components gates and prune by them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastlora.continual.configs.base import AdapterConfig, check_count, check_flag, check_number, check_one_of


@dataclass(frozen=True)
class LoRAConfig(AdapterConfig):
    """Plain LoRA, one adapter per task, merged at the end of the task. Every gate is 1 and frozen."""

    name: ClassVar[str] = "lora"


@dataclass(frozen=True)
class GatedConfig(AdapterConfig):
    """Options of every method that prunes by a proximal step on gates.

    Args:
        prox: exact (the paper's equation) or released (the published code: everything below 2 kappa dies).
        gate_init: normal (N(0, 1), as published) or ones.
        gate_lr: learning rate of the gates at the first step of a task; None for lr.
        drop_dead: remove ranks during the task once their gates cannot leave 0 again; the result is the same, sooner.
    """

    prox: str = "exact"
    gate_init: str = "normal"
    gate_lr: float | None = None
    drop_dead: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("prox", self.prox, ("exact", "released"))
        check_one_of("gate_init", self.gate_init, ("normal", "ones"))
        if self.gate_lr is not None:
            check_number("gate_lr", self.gate_lr, "> 0", lambda v: v > 0.0, "Leave it out to train gates with lr.")
        check_flag("drop_dead", self.drop_dead)


@dataclass(frozen=True)
class CoDyRAConfig(GatedConfig):
    """CoDyRA (arXiv 2412.01004): one gate per rank, a proximal step that removes ranks, one merge per task.

    The defaults are the published ones for ViT-B/16. Other values of `gates` are the controls that tell what of the
    result is due to gates that learn.

    Args:
        kappa_max: last and largest threshold, in gate units (not multiplied by lr). 0 never prunes.
        kappa_steps: number of values of the ramp from 0 to kappa_max.
        dense: share of the task before the ramp starts, without any threshold.
        gates: trained (as published), null_control (drawn; the schedule shrinks them as ever, but they see no gradient),
            preshrunk (drawn, shrunk by all of the schedule before the first step, then frozen) or random (drawn, frozen,
            never pruned).
    """

    name: ClassVar[str] = "codyra"
    kappa_max: float = 0.005
    kappa_steps: int = 50
    dense: float = 0.5
    gates: str = "trained"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("kappa_max", self.kappa_max, ">= 0", lambda v: v >= 0.0, "Give a threshold such as 0.005.")
        check_count("kappa_steps", self.kappa_steps, "Give the number of values of the ramp, 50 in the paper.", least=2)
        check_number("dense", self.dense, "in [0, 1]", lambda v: 0.0 <= v <= 1.0, "Give a share, 0.5 in the paper.")
        check_one_of("gates", self.gates, ("trained", "null_control", "preshrunk", "random"))
        if self.gates != "trained" and self.gate_lr is not None:
            raise ValueError(
                f"gate_lr is {self.gate_lr!r} with gates {self.gates!r}, which do not train. Leave gate_lr out."
            )


@dataclass(frozen=True)
class SoRAConfig(GatedConfig):
    """SoRA (arXiv 2311.11696): gates with a constant threshold from the first step on; one merge per task.

    The defaults are those of the published code's first script, run_glue_sora_no_schedule.sh.

    Args:
        rank: rank-1 components of each adapter of a task, before any pruning; >= 1.
        kappa: threshold of every proximal step, in gate units (xi in the paper; not multiplied by lr). 0 never prunes.
        alpha: the update is scaled by alpha / rank.
        penalty: times the mean |gate| is added to the loss, as the published code does on top of the proximal step, with
            10; 0 leaves the l1 norm to the proximal step alone, as the paper's equation does.
    """

    name: ClassVar[str] = "sora"
    rank: int = 8
    kappa: float = 3e-4
    alpha: float = 16.0
    penalty: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("kappa", self.kappa, ">= 0", lambda v: v >= 0.0, "Give a threshold such as 3e-4.")
        check_number(
            "alpha", self.alpha, "> 0", lambda v: v > 0.0, "Give 16, as published, or rank for a scaling of 1."
        )
        check_number("penalty", self.penalty, ">= 0", lambda v: v >= 0.0, "Give 0, or 10 as the published code.")
