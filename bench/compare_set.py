"""What bench/compare.py measures in one process, of whichever fastlora Python finds: the library's calls by their public names.

python bench/compare_set.py [--small]     JSON: {"seconds": {name: fastest}, "counts": {name: number}, "fastlora": where it lies}
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import cost
import torch

SECONDS = 1.0  # that each call is repeated for
UPDATE = 1e-6  # of a merge: a thousand of them leave every weight finite


def layer(small: bool, outputs: int) -> Callable[[], Any]:
    """Forward and backward of one adapted layer, 788 tokens."""
    from fastlora import FusedRankLoRALinear

    rows, inputs, outputs = (8, 16, 16) if small else (788, 768, outputs)
    module, x = FusedRankLoRALinear(inputs, outputs, rank=16), torch.randn(rows, inputs, requires_grad=True)
    gradient = torch.randn(rows, outputs)
    return lambda: module(x).backward(gradient)


def optimizer(small: bool) -> Callable[[], Any]:
    """ProxAdamW over every adapter of ViT-B/16."""
    from gpu.whole import make_step
    from rivals.optimizers import OPTIMIZERS

    return make_step(SimpleNamespace(small=small, device=torch.device("cpu")), OPTIMIZERS["ProxAdamW"], False)


def merge(small: bool, dtype: torch.dtype) -> Callable[[], Any]:
    """merge_ of the 144 matrices of ViT-B/16."""
    from merge_model import make_set
    from shapes import module_shapes

    from fastlora import ops

    given = make_set(module_shapes(1, (32,)) if small else module_shapes(), 4 if small else 16, dtype, UPDATE)
    return lambda: ops.merge_(*given.lists)


def training_step(small: bool) -> Callable[[], Any]:
    """A whole step of the demo's model, 64 images."""
    from rivals import steps
    from rivals.clip import make_model

    model, sizes, _ = make_model(True)
    if not small:
        sizes = sizes._replace(rank=16, images=64, classes=12)
    model.requires_grad_(False)
    place = steps.OnCpu()
    return steps.ours(place, model, sizes, steps.make_batch(place, sizes))


CALLS: dict[str, Callable[[bool], Callable[[], Any]]] = {
    "layer 768 -> 768, forward + backward": lambda small: layer(small, 768),
    "layer 768 -> 3072, forward + backward": lambda small: layer(small, 3072),
    "ProxAdamW step, 144 adapters": optimizer,
    "merge_, 144 matrices, float16": lambda small: merge(small, torch.float16),
    "merge_, 144 matrices, bfloat16": lambda small: merge(small, torch.bfloat16),
    "training step of the demo's model": training_step,
}


def measure(small: bool) -> dict[str, Any]:
    import fastlora

    torch.set_num_threads(1)
    found: dict[str, Any] = {"seconds": {}, "counts": {}, "fastlora": fastlora.__file__}
    for name, make in CALLS.items():
        torch.manual_seed(0)
        call = make(small)
        call()
        found["counts"][f"{name}: operations"] = cost.operations(call)
        found["counts"][f"{name}: bytes kept"] = cost.kept_bytes(call)
        found["seconds"] |= cost.fastest({name: call}, 0.0 if small else SECONDS)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny shapes, three calls each")
    print(json.dumps(measure(parser.parse_args().small)))
