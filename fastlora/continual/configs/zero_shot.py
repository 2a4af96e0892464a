"""Options of the method that does not train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastlora.continual.configs.base import MethodConfig


@dataclass(frozen=True)
class ZeroShotConfig(MethodConfig):
    """No training: the accuracy of the base model, as the line to compare with."""

    name: ClassVar[str] = "zero_shot"
