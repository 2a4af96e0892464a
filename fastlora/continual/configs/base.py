"""What every method's options are made of: a frozen dataclass that checks itself, and the checks.

Imports neither torch nor open_clip.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar

TARGETS = ("q", "k", "v", "out", "fc1", "fc2")


class UsageError(ValueError):
    """The command line or a config file asks for something that does not exist."""


def _parts(doc: str | None) -> tuple[str, str]:
    """What stands before `Args:`, and its entries; Python 3.13 takes the indentation away, older ones leave it."""
    head, _, arguments = inspect.cleandoc(doc or "").partition("Args:\n")
    return head.rstrip(), arguments and f"{arguments}\n"


def _without(arguments: str, own: str) -> str:
    """`arguments` less those that `own` documents again."""
    entries = re.findall(r"^    \w.*\n(?:        .*\n)*", arguments, re.MULTILINE)
    return "".join(entry for entry in entries if not re.search(rf"^    {entry.split(':')[0].strip()}:", own, re.M))


@dataclass(frozen=True)
class MethodConfig:
    """Base of every method's options. A subclass documents its own in `Args:`; those of its bases are put before them."""

    name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        base = next((found for parent in cls.__mro__[1:] if (found := _parts(parent.__doc__)[1])), "")
        head, own = _parts(cls.__doc__)
        if base:  # what --help shows of an option is what the docstring of its own class says
            cls.__doc__ = f"{head}\n\nArgs:\n{_without(base, own)}{own}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values with the method's name first, ready for YAML or JSON."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {"name": self.name} | {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


@dataclass(frozen=True)
class TrainedConfig(MethodConfig):
    """Options of every method that trains.

    Args:
        iterations: optimizer steps per task.
        batch_size: images per step.
        lr: learning rate at the first step of a task; falls to 0 along a cosine over the task.
        where: which tower trains: vision, text or all.
        merge_scale: what was learned is merged times this, in (0, 1]; less forgets less and learns less.
        clip_norm: gradients of a step are scaled down to this norm, over all of them; 0 to leave them as they are.
    """

    iterations: int = 500
    batch_size: int = 64
    lr: float = 5e-4
    where: str = "all"
    merge_scale: float = 1.0
    clip_norm: float = 0.0

    def __post_init__(self) -> None:
        check_count("iterations", self.iterations, "Give the optimizer steps per task, 500 in the paper.")
        check_count("batch_size", self.batch_size, "Give the images per step, 64 in the paper.")
        check_number("lr", self.lr, "> 0", lambda v: v > 0.0, "Give a step size such as 5e-4.")
        check_one_of("where", self.where, ("all", "vision", "text"))
        check_number("merge_scale", self.merge_scale, "in (0, 1]", lambda v: 0.0 < v <= 1.0, "Give 1 to merge it all.")
        check_number("clip_norm", self.clip_norm, ">= 0", lambda v: v >= 0.0, "Give 0 for no clipping, or such as 1.")


@dataclass(frozen=True)
class AdapterConfig(TrainedConfig):
    """Options of every method that trains adapters.

    Args:
        rank: rank-1 components of each adapter of a task, before any pruning; >= 1.
        targets: which linear layers get an adapter, out of q, k, v, out, fc1, fc2.
        distillation: factor of a loss that holds the model to what a teacher says of images and texts; 0 for none.
        teacher: of distillation, previous (the model before the task) or base (the one before the first task).
        distil_on: of distillation, task (the images of the step against reference texts; no other image is needed) or
            reference (images of no task, too).
        temperature: of the softmax on both sides of distillation; > 0.
        references: images and texts of the reference data that are used, at most; drawn once from the seed.
    """

    rank: int = 16
    targets: tuple[str, ...] = TARGETS
    distillation: float = 0.0
    teacher: str = "previous"
    distil_on: str = "task"
    temperature: float = 2.0
    references: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "targets", check_targets(self.targets))
        check_count("rank", self.rank, "Give the number of rank-1 components per layer, 16 in the paper.")
        check_number("distillation", self.distillation, ">= 0", lambda v: v >= 0.0, "Give a factor such as 1.")
        check_one_of("teacher", self.teacher, ("previous", "base"))
        check_one_of("distil_on", self.distil_on, ("task", "reference"))
        check_number("temperature", self.temperature, "> 0", lambda v: v > 0.0, "Give 2, as published.")
        check_count("references", self.references, "Give the largest number of reference texts, such as 8192.")


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


def check_flag(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be true or false.")


def check_number(name: str, value: Any, range_text: str, accepts: Any, advice: str) -> None:
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not accepts(value):
        raise ValueError(f"{name} is {value!r}; it must be a finite number {range_text}. {advice}")


def check_targets(targets: Any) -> tuple[str, ...]:
    if isinstance(targets, str) or not isinstance(targets, Iterable):
        raise ValueError(f"targets is {targets!r}; it must be a list out of {', '.join(TARGETS)}, such as [q, v].")
    given = list(targets)
    if not given or len(set(given)) != len(given):
        raise ValueError(f"targets is {given}; it must name at least one of {', '.join(TARGETS)}, each at most once.")
    for target in given:
        check_one_of("target", target, TARGETS)
    return tuple(target for target in TARGETS if target in given)
