"""The parts in the order in which a machine without results is best asked, and what each goal needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple


class Part(NamedTuple):
    """seconds: its share of the time, where the whole has 480; module.function runs it."""

    name: str
    title: str
    seconds: float
    module: str
    goals: tuple[str, ...] = ()
    optional: bool = False

    def load(self) -> Callable[[Any], None]:
        """The function, imported only by the process that measures."""
        import importlib

        return getattr(importlib.import_module(f"gpu.{self.module}"), self.name)


PARTS = {
    part.name: part
    for part in (
        Part("facts", "device, driver, versions, commit", 10, "machine"),
        Part("build", "what fastlora was built with", 5, "machine"),
        Part("correctness", "every variant against float64, then the GPU tests", 90, "machine"),
        Part("ceilings", "library product and copy", 10, "machine"),
        Part("library", "F.linear at every shape", 25, "layers"),
        Part("plain", "plain Triton product against the library", 40, "layers", ("G11",)),
        Part("tune", "fastlora's own tuning (with --tune SECONDS)", 60, "layers", (), True),
        Part("forward", "forward variants", 40, "layers", ("G1", "G2", "G3")),
        Part("backward", "forward + backward against everyone but the compiler", 70, "layers", ("G4", "G6")),
        Part("lorafusion", "LoRAFusion's grid", 25, "layers", ("G7",)),
        Part("merge", "merge of 144 modules", 15, "whole", ("G8",)),
        Part("optimizer", "optimizer and proximal step", 15, "whole", ("G9",)),
        Part("step", "a whole training step", 60, "step", ("G10",)),
        Part("launch", "host time and launches of a call", 15, "layers"),
        # last: what the compiler takes is unknown, and nothing may be lost to it
        Part("compiled", "forward + backward against torch.compile", 200, "layers", ("G5",)),
    )
}
# without these no figure of another part can be read
ALWAYS = ("facts", "ceilings")


def select(only: Iterable[str], tune: bool) -> list[str]:
    """Part names for goals and part names as given; everything if nothing is.

    Raises:
        ValueError: neither a goal nor a part.
    """
    asked = list(only)
    known = {goal for part in PARTS.values() for goal in part.goals}
    for word in asked:
        if word not in PARTS and word not in known:
            raise ValueError(f"--only {word}: accepted are {', '.join([*sorted(known), *PARTS])}.")
    return [
        name
        for name, part in PARTS.items()
        if (name in asked or name in ALWAYS or set(part.goals) & set(asked) if asked else not part.optional)
        or (part.name == "tune" and tune)
    ]
