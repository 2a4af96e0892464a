"""Options of the methods that act on the rank-1 components of sequential LoRA, whose gates are 1 and frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastlora.continual.configs.base import AdapterConfig, check_number, check_one_of


@dataclass(frozen=True)
class DecayBConfig(AdapterConfig):
    """Sequential LoRA whose B decays a little after every step.

    Args:
        rank: rank-1 components of each adapter of a task; all are kept.
        decay: B is multiplied by 1 - decay * lr_t / lr after every step.
    """

    name: ClassVar[str] = "decay_b"
    rank: int = 8
    decay: float = 0.0072

    def __post_init__(self) -> None:
        super().__post_init__()
        advice = "Give a small one: iterations / 2 times it is the exponent of the decay."
        check_number("decay", self.decay, "in [0, 1)", lambda v: 0.0 <= v < 1.0, advice)


@dataclass(frozen=True)
class ShrinkingConfig(AdapterConfig):
    """Options of the rules that shrink components by the norm of what they contribute.

    Args:
        shrink: lambda; from 0.3 of the task on the threshold of a step is 5 lambda lr_t, in units of ||b|| ||a||.
    """

    shrink: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("shrink", self.shrink, ">= 0", lambda v: v >= 0.0, "Give 1, or 0 for no shrinking.")


@dataclass(frozen=True)
class UniformShrinkConfig(ShrinkingConfig):
    """Sequential LoRA whose components shrink by a factor that all of a module share: the rule that selects nothing.

    Args:
        rank: rank-1 components of each adapter of a task; all are kept.
    """

    name: ClassVar[str] = "uniform_shrink"
    rank: int = 8


@dataclass(frozen=True)
class ContributionProxConfig(ShrinkingConfig):
    """Sequential LoRA with a group soft threshold on each component: small contributions die."""

    name: ClassVar[str] = "contribution_prox"


@dataclass(frozen=True)
class SelectingConfig(ShrinkingConfig):
    """Options of the methods that drop components once, in the middle of a task.

    Args:
        shrink: lambda of a uniform shrink beside the selection (as method uniform_shrink); 0 for none.
        keep: share of all components of the model that is kept.
        at: share of the task after which the others are dropped.
    """

    shrink: float = 0.0
    keep: float = 0.5
    at: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("keep", self.keep, "in (0, 1]", lambda v: 0.0 < v <= 1.0, "Give 0.5 to keep half of them.")
        check_number("at", self.at, "in (0, 1]", lambda v: 0.0 < v <= 1.0, "Give 0.5 for the middle of the task.")


@dataclass(frozen=True)
class RandomSelectionConfig(SelectingConfig):
    """Sequential LoRA that drops components at random in the middle of a task: the control of every selection."""

    name: ClassVar[str] = "random_selection"


@dataclass(frozen=True)
class PathCreditConfig(SelectingConfig):
    """Sequential LoRA that keeps the components to whose steps most of the fall of the loss is due.

    Args:
        budget: how many components a module keeps: model (as many as it has among the best of the whole model) or module
            (in proportion to the sum of its credits).
        within: which of its components a module keeps: credit (the best) or random.
    """

    name: ClassVar[str] = "path_credit"
    budget: str = "model"
    within: str = "credit"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("budget", self.budget, ("model", "module"))
        check_one_of("within", self.within, ("credit", "random"))
