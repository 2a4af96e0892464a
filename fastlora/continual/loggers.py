"""Copies of a run's figures for TensorBoard and Weights & Biases; log.csv and metrics.json are written in any case."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol


class Logger(Protocol):
    """Takes figures as they come."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Figures by name, 'group/name', at a step (the iterations of all tasks so far)."""

    def close(self) -> None:
        """Write what is held back."""


class TensorBoard:
    """Event files in the folder `tensorboard` of the run directory."""

    package, module = "tensorboard", "torch.utils.tensorboard"

    def __init__(self, module: Any, out: Path, config: Mapping[str, Any]) -> None:
        self._writer = module.SummaryWriter(str(out / "tensorboard"))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of the project `fastlora`, named as the run directory, which holds its files. WANDB_MODE decides the rest."""

    package, module = "wandb", "wandb"

    def __init__(self, module: Any, out: Path, config: Mapping[str, Any]) -> None:
        self._run = module.init(project="fastlora", name=out.name, dir=str(out), config=dict(config))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


LOGGERS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WandB}


class Loggers:
    """Every logger that a run asked for, as one; opened with the first figures, once the run directory is there.

    Args:
        names: out of tensorboard and wandb.
        out: run directory.
        config: what the run was configured with.
    Raises:
        ImportError: a package is missing; the message says what to install.
        ValueError: loggers without a run directory.
    """

    def __init__(self, names: Sequence[str], out: Path | None, config: Mapping[str, Any]) -> None:
        if names and out is None:
            raise ValueError(f"log_to is {list(names)}, which needs a run directory. Pass out, or leave log_to empty.")
        self._out, self._config = out, config
        self._modules = {name: _module(LOGGERS[name]) for name in names}
        self._open: list[Logger] | None = None

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """What is None is left out."""
        if self._open is None:
            self._open = [LOGGERS[name](module, self._out, self._config) for name, module in self._modules.items()]
        for logger in self._open:
            logger.scalars(step, {name: value for name, value in values.items() if value is not None})

    def close(self) -> None:
        for logger in self._open or ():
            logger.close()


def _module(logger: Any) -> Any:
    try:
        return importlib.import_module(logger.module)
    except ImportError:
        raise ImportError(
            f"log_to names {logger.package}, which is not installed. Run: pip install {logger.package}, "
            f"or leave it out; log.csv is written in any case."
        ) from None
