"""The continual trainer: streams of tasks, methods, metrics, runs and reports.

Names are resolved on first use: reading a finished run needs neither torch nor open_clip.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "CoDyRAConfig": "config",
    "InMemoryImages": "stream",
    "LoRAConfig": "config",
    "METHODS": "methods",
    "Task": "stream",
    "TaskStream": "stream",
    "Trainer": "trainer",
    "ZeroShotConfig": "config",
    "evaluate": "evaluation",
    "read_run": "saved_run",
}
_SUBMODULES = ("demo", "methods", "metrics")

__all__ = [*_EXPORTS, *_SUBMODULES]

if TYPE_CHECKING:
    from fastlora.continual.config import CoDyRAConfig, LoRAConfig, ZeroShotConfig
    from fastlora.continual.evaluation import evaluate
    from fastlora.continual.methods import METHODS
    from fastlora.continual.saved_run import read_run
    from fastlora.continual.stream import InMemoryImages, Task, TaskStream
    from fastlora.continual.trainer import Trainer


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(f"fastlora.continual.{_EXPORTS[name]}"), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"fastlora.continual.{name}")
    else:
        raise AttributeError(f"module 'fastlora.continual' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
