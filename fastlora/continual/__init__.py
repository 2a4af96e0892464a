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
    # as in fastlora/__init__.py
    from fastlora.continual import demo as demo
    from fastlora.continual import methods as methods
    from fastlora.continual import metrics as metrics
    from fastlora.continual.config import CoDyRAConfig as CoDyRAConfig
    from fastlora.continual.config import LoRAConfig as LoRAConfig
    from fastlora.continual.config import ZeroShotConfig as ZeroShotConfig
    from fastlora.continual.evaluation import evaluate as evaluate
    from fastlora.continual.methods import METHODS as METHODS
    from fastlora.continual.saved_run import read_run as read_run
    from fastlora.continual.stream import InMemoryImages as InMemoryImages
    from fastlora.continual.stream import Task as Task
    from fastlora.continual.stream import TaskStream as TaskStream
    from fastlora.continual.trainer import Trainer as Trainer
else:

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
