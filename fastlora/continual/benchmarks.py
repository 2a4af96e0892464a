"""Benchmarks by name: what `--benchmark` accepts, and the methods' options where the published ones do not fit."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from fastlora.continual.config import MethodConfig, check_one_of

if TYPE_CHECKING:
    from torch import nn

    from fastlora.continual.stream import TaskStream


class Loaded(NamedTuple):
    """A model, its tokenizer, and the tasks."""

    model: nn.Module
    tokenizer: Any
    stream: TaskStream


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Args:
        load: seed -> Loaded; imports what it needs when it is called.
        defaults: options that replace the defaults of every method that has them.
        presets: method name -> options that replace those in turn.
    """

    load: Callable[[int], Loaded]
    defaults: dict[str, Any] = field(default_factory=dict)
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)

    def preset(self, config: type[MethodConfig]) -> dict[str, Any]:
        """The options of a method that differ from its own defaults on this benchmark."""
        known = {item.name for item in dataclasses.fields(config)}
        return {key: value for key, value in self.defaults.items() if key in known} | self.presets.get(config.name, {})


def _load_demo(seed: int, split: str = "test") -> Loaded:
    from fastlora.continual.demo import demo_stream, open_clip_demo

    demo = open_clip_demo()
    return Loaded(demo.model, demo.tokenizer, demo_stream(seed, split=split))


# The embedded model is small and starts far from its tasks: fewer, larger steps. kappa_max keeps the published total
# shrink of 0.65 (so the published expected sparsity) at 120 iterations: KappaSchedule.for_shrink(0.65, total=120). SoRA
# shrinks as much in all, and B decays by as much as with the default at 500 iterations.
_DEMO_DEFAULTS = {"iterations": 120, "lr": 1e-3}

# Methods that train the weights themselves: the rate of the highest Average on the validation sets, of 3e-5, 1e-4, 3e-4;
# ten weights a task enter the mean of ZSCL, as published.
_DEMO_PRESETS = {"codyra": {"kappa_max": 0.0211}, "sora": {"kappa": 0.65 / 120}, "decay_b": {"decay": 0.03}}
_DEMO_PRESETS |= {name: {"lr": 1e-4} for name in ("full", "wise_ft", "lwf")}
_DEMO_PRESETS |= {"zscl": {"lr": 1e-4, "average_every": 12}}

BENCHMARKS = {
    "demo": Benchmark(_load_demo, _DEMO_DEFAULTS, _DEMO_PRESETS),
    # the same training data, other test sets: to choose options without a look at those of demo
    "demo_validation": Benchmark(functools.partial(_load_demo, split="validation"), _DEMO_DEFAULTS, _DEMO_PRESETS),
}


def benchmark(name: str) -> Benchmark:
    """The benchmark called `name`.

    Raises:
        ValueError: there is none; the accepted names and the nearest are told.
    """
    check_one_of("benchmark", name, BENCHMARKS)
    return BENCHMARKS[name]
