"""Options of the methods that constrain or restructure the adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastlora.continual.configs.base import AdapterConfig, check_count, check_number, check_one_of

_SHARE = "Give a share such as 0.95."


@dataclass(frozen=True)
class LoRASqueezeConfig(AdapterConfig):
    """LoRA-Squeeze (arXiv 2602.10993): train at a high rank, keep the best approximation of the update at a lower one.

    Args:
        rank: rank-1 components of each adapter before the first squeeze; >= 1.
        target_rank: components that the last squeeze keeps; where rank is lower, all of them.
        energy: share of ||delta W||_F^2 that each squeeze keeps, in place of target_rank, in [0, 1); 0: target_rank.
        squeezes: number of squeezes during a task, evenly spaced, with ranks that fall in equal ratios; 0: one after it.
    """

    name: ClassVar[str] = "lora_squeeze"
    target_rank: int = 4
    energy: float = 0.0
    squeezes: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("target_rank", self.target_rank, "Give the components to keep, such as 4.")
        check_number("energy", self.energy, "in [0, 1)", lambda v: 0.0 <= v < 1.0, _SHARE)
        check_count("squeezes", self.squeezes, "Give 0 for one squeeze after the task.", least=0)
        if self.squeezes >= self.iterations:
            raise ValueError(
                f"squeezes is {self.squeezes} with {self.iterations} iterations; training must go on between two. "
                "Give fewer squeezes than iterations."
            )


@dataclass(frozen=True)
class SDLoRAConfig(AdapterConfig):
    """SD-LoRA (arXiv 2501.13198): directions of earlier tasks are frozen, the magnitudes of all tasks are trained.

    Args:
        rank: rank-1 components that each task adds to a layer; those of all tasks together are at most 256.
        magnitude_lr: learning rate of the magnitudes at the first step of a task; None for lr.
            A magnitude is about as large as the update of its task; with lr it moves by a few percent of that.
    """

    name: ClassVar[str] = "sd_lora"
    magnitude_lr: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.magnitude_lr is not None:
            advice = "Leave it out to train magnitudes with lr."
            check_number("magnitude_lr", self.magnitude_lr, "> 0", lambda v: v > 0.0, advice)


@dataclass(frozen=True)
class InfLoRAConfig(AdapterConfig):
    """InfLoRA (arXiv 2404.00228): lora_a is designed orthogonal to the inputs of earlier tasks, and lora_b alone trains.

    Args:
        energy: share of the energy of a layer's inputs in the first task that its memory holds, in (0, 1].
        energy_step: what that share grows by at every task, up to 1; >= 0.
    """

    name: ClassVar[str] = "inflora"
    energy: float = 0.98
    energy_step: float = 0.002

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("energy", self.energy, "in (0, 1]", lambda v: 0.0 < v <= 1.0, _SHARE)
        check_number("energy_step", self.energy_step, ">= 0", lambda v: v >= 0.0, "Give 0 for the same share always.")


@dataclass(frozen=True)
class OLoRAConfig(AdapterConfig):
    """O-LoRA (arXiv 2310.14152): a penalty on the overlap of lora_a with that of every earlier task.

    Args:
        penalty: factor of the overlap in the loss, >= 0; 0 is plain LoRA.
    """

    name: ClassVar[str] = "o_lora"
    penalty: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("penalty", self.penalty, ">= 0", lambda v: v >= 0.0, "Give a factor such as 0.5.")


@dataclass(frozen=True)
class PEARLConfig(AdapterConfig):
    """PEARL (arXiv 2505.11998): the rank of each layer from the spectrum of a brief fine-tuning on the task.

    Args:
        rank: largest rank that a layer may get; >= 1.
        energy: share of the squared norm of a layer's task vector that its rank must hold, in (0, 1].
        reference_iterations: steps of the brief fine-tuning of the full matrices; >= 1.
        reference_lr: of these steps; no step moves the weights farther than this (Frobenius norm over all of them).
    """

    name: ClassVar[str] = "pearl"
    energy: float = 0.9
    reference_iterations: int = 20
    reference_lr: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("energy", self.energy, "in (0, 1]", lambda v: 0.0 < v <= 1.0, _SHARE)
        check_count("reference_iterations", self.reference_iterations, "Give the steps, such as 20.")
        check_number("reference_lr", self.reference_lr, "> 0", lambda v: v > 0.0, "Give a step length such as 0.1.")


_CALLED = ("fc1", "fc2")


@dataclass(frozen=True)
class ExpertPoolConfig(AdapterConfig):
    """A pool of rank-1 experts in each layer (arXiv 2601.22828), a few of which are active on each token or sample.

    Args:
        rank: rank-1 experts that each task adds to the pool of a layer; those of all tasks together are at most 256.
        targets: which linear layers get a pool, out of fc1 and fc2.
        active: experts at work at a time; all of them while the pool has fewer.
        per: token (each token chooses its own) or sample (chosen by its first token, [CLS] in the vision tower).
    """

    name: ClassVar[str] = "expert_pool"
    targets: tuple[str, ...] = _CALLED
    active: int = 8
    per: str = "token"

    def __post_init__(self) -> None:
        super().__post_init__()
        refused = [target for target in self.targets if target not in _CALLED]
        if refused:
            raise ValueError(
                f"targets hold {', '.join(refused)}; a pool chooses its experts when a layer is called with its input, "
                "and attention reads these weights without a call. Give fc1, fc2 or both."
            )
        check_count("active", self.active, "Give the experts at work at a time, 8 in the paper.")
        check_one_of("per", self.per, ("sample", "token"))
        if self.merge_scale != 1.0:
            raise ValueError(f"merge_scale is {self.merge_scale}; a pool is never merged. Leave it at 1.")
        if self.teacher != "previous":
            raise ValueError(
                f"teacher is {self.teacher!r}; a pool stays beside the weights, and the base model without it is not at hand. "
                "Leave it at previous."
            )
