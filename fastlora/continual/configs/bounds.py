"""Options of the upper bounds, which break a rule that continual methods keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastlora.continual.configs.base import AdapterConfig, check_one_of


@dataclass(frozen=True)
class JointConfig(AdapterConfig):
    """Training on all tasks at once, in turn, with iterations x tasks steps: what forgetting nothing would give.

    Args:
        train: adapters (one LoRA, merged in the end) or weights (full fine-tuning, which needs a far smaller lr).
    """

    name: ClassVar[str] = "joint"
    train: str = "adapters"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("train", self.train, ("adapters", "weights"))


@dataclass(frozen=True)
class PerTaskConfig(AdapterConfig):
    """One LoRA per task on the base model, and the task is known at test time: nothing can be forgotten."""

    name: ClassVar[str] = "per_task"
