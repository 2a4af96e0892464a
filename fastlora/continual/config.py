"""What a user can set: frozen dataclasses that check themselves on construction. Imports neither torch nor open_clip.

One class per method; `CONFIGS` maps the name typed after `--method` to it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, ClassVar

TARGETS = ("q", "k", "v", "out", "fc1", "fc2")


class UsageError(ValueError):
    """The command line or a config file asks for something that does not exist."""


@dataclass(frozen=True)
class MethodConfig:
    """Base of every method's options."""

    name: ClassVar[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values with the method's name first, ready for YAML or JSON."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {"name": self.name} | {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


@dataclass(frozen=True)
class ZeroShotConfig(MethodConfig):
    """No training: the accuracy of the base model, as the line to compare with."""

    name: ClassVar[str] = "zero_shot"


@dataclass(frozen=True)
class LoRAConfig(MethodConfig):
    """Plain LoRA, one adapter per task, merged at the end of the task. Every gate is 1 and frozen.

    Args:
        rank: rank of each adapter, >= 1.
        iterations: optimizer steps per task.
        batch_size: images per step.
        lr: learning rate at the first step of a task; falls to 0 along a cosine over the task.
        targets: which linear layers get an adapter, out of q, k, v, out, fc1, fc2.
        where: which tower: vision, text or all.
    """

    name: ClassVar[str] = "lora"
    rank: int = 16
    iterations: int = 500
    batch_size: int = 64
    lr: float = 5e-4
    targets: tuple[str, ...] = TARGETS
    where: str = "all"

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", _targets(self.targets))
        check_count("rank", self.rank, "Give the number of rank-1 components per layer, 16 in the paper.")
        check_count("iterations", self.iterations, "Give the optimizer steps per task, 500 in the paper.")
        check_count("batch_size", self.batch_size, "Give the images per step, 64 in the paper.")
        _check_number("lr", self.lr, "> 0", lambda v: v > 0.0, "Give a step size such as 5e-4.")
        check_one_of("where", self.where, ("all", "vision", "text"))


@dataclass(frozen=True)
class CoDyRAConfig(LoRAConfig):
    """CoDyRA (arXiv 2412.01004): one gate per rank, a proximal step that removes ranks, one merge per task.

    The defaults are the published ones for ViT-B/16.

    Args:
        rank: rank-1 components of each adapter before pruning, >= 1.
        iterations: optimizer steps per task.
        batch_size: images per step.
        lr: learning rate at the first step of a task; falls to 0 along a cosine over the task.
        targets: which linear layers get an adapter, out of q, k, v, out, fc1, fc2.
        where: which tower: vision, text or all.
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
        _check_number("kappa_max", self.kappa_max, ">= 0", lambda v: v >= 0.0, "Give a threshold such as 0.005.")
        check_count("kappa_steps", self.kappa_steps, "Give the number of values of the ramp, 50 in the paper.", least=2)
        _check_number("dense", self.dense, "in [0, 1]", lambda v: 0.0 <= v <= 1.0, "Give a share, 0.5 in the paper.")
        check_one_of("prox", self.prox, ("exact", "released"))
        check_one_of("gate_init", self.gate_init, ("normal", "ones"))
        if not isinstance(self.drop_dead, bool):
            raise ValueError(f"drop_dead is {self.drop_dead!r}; it must be true or false.")


@dataclass(frozen=True)
class RunConfig:
    """A run: which benchmark, which method, and how it is carried out.

    Args:
        benchmark: name of the task stream.
        method: the method's options.
        seed: decides adapters, image order and, in few-shot benchmarks, the training images; >= 0.
        device: auto (a GPU where torch sees one), cpu, cuda, cuda:1 ...
        backend: of the adapted layers: auto, torch or triton.
        eval_batch_size: images per forward pass in evaluation.
        log_every: iterations from one line of log.csv to the next.
        checkpoints: merged weights to keep: last (after the last task), all, or none. The adapters are always kept.
    """

    benchmark: str = "demo"
    method: MethodConfig = field(default_factory=CoDyRAConfig)
    seed: int = 0
    device: str = "auto"
    backend: str = "auto"
    eval_batch_size: int = 256
    log_every: int = 10
    checkpoints: str = "last"

    def __post_init__(self) -> None:
        if not isinstance(self.method, MethodConfig):
            raise ValueError(f"method is {self.method!r}; it must be a config. Build one, such as CoDyRAConfig().")
        check_count("seed", self.seed, "Give 0 or another whole number.", least=0)
        check_one_of("backend", self.backend, ("auto", "torch", "triton"))
        check_count("eval_batch_size", self.eval_batch_size, "Give the images per forward pass, such as 256.")
        check_count("log_every", self.log_every, "Give the iterations between two lines of the log, such as 10.")
        check_one_of("checkpoints", self.checkpoints, ("last", "all", "none"))

    def keeps_checkpoint(self, task: int, tasks: int) -> bool:
        """Whether the merged weights after `task` (from 1) of `tasks` are saved."""
        return self.checkpoints == "all" or (self.checkpoints == "last" and task == tasks)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for YAML; what `fastlora train --config` reads."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return values | {"method": self.method.as_dict()}


CONFIGS: dict[str, type[MethodConfig]] = {cls.name: cls for cls in (CoDyRAConfig, LoRAConfig, ZeroShotConfig)}


def method_config(name: str, **options: Any) -> MethodConfig:
    """The config of the method called `name`.

    Raises:
        ValueError: no method of that name, or an option that the method does not have; the nearest name is told.
    """
    check_one_of("method", name, CONFIGS)
    accepted = [item.name for item in dataclasses.fields(CONFIGS[name])]
    for option in options:
        check_one_of(f"option of method {name}", option, accepted)
    return CONFIGS[name](**options)


def check_one_of(what: str, value: Any, accepted: Iterable[str]) -> None:
    """Raises ValueError unless `value` is one of `accepted`; names them all and the nearest."""
    accepted = list(accepted)
    if value not in accepted:
        listed = ", ".join(accepted) if accepted else "(none)"
        raise ValueError(f"{what} is {value!r}; accepted: {listed}.{nearest(str(value), accepted)}")


def nearest(value: str, accepted: Iterable[str]) -> str:
    """' Did you mean ...?' for the closest of `accepted`, or an empty string where nothing is close."""
    close = difflib.get_close_matches(value.lower(), list(accepted), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_count(name: str, value: Any, advice: str, least: int = 1) -> None:
    """Raises ValueError unless `value` is an integer >= least."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} is {value!r}; it must be an integer >= {least}. {advice}")


def _check_number(name: str, value: Any, range_text: str, accepts: Any, advice: str) -> None:
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not accepts(value):
        raise ValueError(f"{name} is {value!r}; it must be a finite number {range_text}. {advice}")


def _targets(targets: Any) -> tuple[str, ...]:
    if isinstance(targets, str) or not isinstance(targets, Iterable):
        raise ValueError(f"targets is {targets!r}; it must be a list out of {', '.join(TARGETS)}, such as [q, v].")
    given = list(targets)
    if not given or len(set(given)) != len(given):
        raise ValueError(f"targets is {given}; it must name at least one of {', '.join(TARGETS)}, each at most once.")
    for target in given:
        check_one_of("target", target, TARGETS)
    return tuple(target for target in TARGETS if target in given)
