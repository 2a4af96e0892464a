"""Everything that is timed side by side: fastlora by variant, and the ways others compute the same layer."""

from __future__ import annotations

import torch

from rivals import eager_released, ours, peft_layer, unsloth_style
from rivals.case import Absent, Case, Check, Operands, make_operands

__all__ = ["ALL", "OTHERS", "OURS", "Absent", "Case", "Check", "Operands", "build", "make_operands"]

OURS = ("ours auto", *(f"ours {variant}" for variant in ours.VARIANTS))
OTHERS = ("linear", "as released", "compiled", "peft", "peft no-cast", "unsloth style")
ALL = (*OURS, "ours auto float32 adapters", *OTHERS)


def build(name: str, operands: Operands, *, small: bool = False) -> Case:
    """The rival `name` over `operands`.

    Raises:
        Absent: it cannot run here.
    """
    if name.startswith("ours module"):
        return ours.build_module(operands, float(name.removeprefix("ours module").removeprefix(" dropout ") or 0))
    if name.startswith("ours "):
        variant, _, adapters = name.removeprefix("ours ").partition(" ")
        return ours.build(operands, variant, torch.float32 if adapters else None)
    makers = {
        "linear": eager_released.build_linear,
        "as released": eager_released.build_released,
        "compiled": lambda o: eager_released.build_compiled(o, small),
        "peft": lambda o: peft_layer.build(o, cast=True),
        "peft no-cast": lambda o: peft_layer.build(o, cast=False),
        "unsloth style": unsloth_style.build,
    }
    return makers[name](operands)
