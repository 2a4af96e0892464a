"""Options of the methods that train the weights themselves, without adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastlora.continual.configs.base import TrainedConfig, check_count, check_number, check_one_of


@dataclass(frozen=True)
class FullConfig(TrainedConfig):
    """Full fine-tuning, one task after the other.

    Args:
        merge_scale: after a task, theta <- theta_previous + merge_scale (theta - theta_previous); in (0, 1].
        weight_decay: of AdamW, towards 0 and not towards the previous weights; >= 0.
        parameters: all of the tower, or matrices: the ones of its blocks alone, which are what adapters update.
    """

    name: ClassVar[str] = "full"
    lr: float = 1e-5
    weight_decay: float = 0.0
    parameters: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("weight_decay", self.weight_decay, ">= 0", lambda v: v >= 0.0, "Give 0 for none.")
        check_one_of("parameters", self.parameters, ("all", "matrices"))


@dataclass(frozen=True)
class WiSEFTConfig(FullConfig):
    """WiSE-FT (arXiv 2109.01903): full fine-tuning, then interpolation with the weights of an anchor.

    Args:
        alpha: share of the fine-tuned weights, in [0, 1]; 0.5 is the paper's advice, ZSCL's tables have 0.8.
        anchor: zero_shot (the base model, as in the paper) or previous (the model before the task, as in ZSCL's tables).
    """

    name: ClassVar[str] = "wise_ft"
    alpha: float = 0.5
    anchor: str = "zero_shot"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha, "in [0, 1]", lambda v: 0.0 <= v <= 1.0, "Give a share such as 0.5.")
        check_one_of("anchor", self.anchor, ("zero_shot", "previous"))


@dataclass(frozen=True)
class DistilledConfig(FullConfig):
    """Options of the methods that hold the model to what a teacher says.

    Args:
        distillation: factor of the distillation loss; >= 0.
        temperature: of the softmax on both sides of it; > 0.
        text_features: whose text features the images of the model in training are compared with: teacher (as in ZSCL's
            published code; the texts are encoded once a task) or student (the text tower is held, too; every step).
    """

    distillation: float = 1.0
    temperature: float = 2.0
    text_features: str = "teacher"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("distillation", self.distillation, ">= 0", lambda v: v >= 0.0, "Give a factor such as 1.")
        check_number("temperature", self.temperature, "> 0", lambda v: v > 0.0, "Give 2, as published.")
        check_one_of("text_features", self.text_features, ("teacher", "student"))


@dataclass(frozen=True)
class LwFConfig(DistilledConfig):
    """LwF (arXiv 1606.09282): full fine-tuning, held to what the previous model says of the earlier tasks' classes."""

    name: ClassVar[str] = "lwf"


@dataclass(frozen=True)
class ZSCLConfig(DistilledConfig):
    """ZSCL (arXiv 2303.06628): full fine-tuning, held to what the base model says of reference images and texts.

    The stream must have reference data.

    Args:
        average_every: steps from one weight to the next that enters the mean of the weights; 0 for no mean.
        consolidation: factor of the squared distance from the weights before the task; >= 0.
        references: images and texts of the reference data that are used, at most; drawn once from the seed.
    """

    name: ClassVar[str] = "zscl"
    average_every: int = 100
    consolidation: float = 0.0
    references: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("average_every", self.average_every, "Give the steps, 100 of 1000 in the paper.", least=0)
        check_number("consolidation", self.consolidation, ">= 0", lambda v: v >= 0.0, "Give 0 for none.")
        check_count("references", self.references, "Give the largest number of reference images, such as 8192.")
