"""What a user's type checker makes of fastlora; mypy reads this file and nothing runs it.

`assert_type` holds the types that the public functions promise. A `type: ignore` marks a mistake that has to be found:
where it is not, mypy reports the comment as unused.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from typing_extensions import assert_type

import fastlora
from fastlora.continual import CoDyRAConfig, Task, TaskStream, Trainer
from fastlora.continual.stream import MapStyle
from fastlora.modules import RankAdapter
from fastlora.ops import ModuleMerge


def layers(linear: nn.Linear, x: Tensor) -> None:
    layer = fastlora.FusedRankLoRALinear(16, 32, rank=4, kappa=0.1, device="cpu", dtype=torch.bfloat16)
    assert_type(fastlora.FusedRankLoRALinear.from_linear(linear, rank=4, scaling=2.0), fastlora.FusedRankLoRALinear)
    assert_type(layer.weight, Tensor)
    assert_type(layer.lora_a, nn.Parameter)
    assert_type(layer.gate, nn.Parameter)
    assert_type(layer.kappa, float)
    assert_type(layer.forward(x), Tensor)
    assert_type(layer.active_rank(), int)
    assert_type(layer.prune_(), int)
    assert_type(layer.delta_weight(), Tensor)
    assert_type(layer.merge_(rounding="stochastic", seed=0), fastlora.MergeReport)
    assert_type(layer.to_linear(), nn.Linear)
    nn.Sequential(layer)
    plain: nn.Linear = layer
    plain.extra_repr()
    layer.kappa = "0.1"  # type: ignore[assignment]
    fastlora.FusedRankLoRALinear(16, 32, kapa=0.1)  # type: ignore[call-arg]
    fastlora.FusedRankLoRALinear.from_linear(linear, kapa=0.1)  # type: ignore[call-arg]


def models(model: nn.Module) -> None:
    report = fastlora.inject(model, 16, targets=["q", "v"], where="vision", kappa=0.0, backend="auto")
    fastlora.inject(model, where=lambda name, module: name.startswith("head") and isinstance(module, nn.Linear))
    fastlora.inject(model, where=["blocks.*.fc1"])
    assert_type(report.names, tuple[str, ...])
    assert_type(report.trainable_parameters, int)
    assert_type(fastlora.adapters(model), Iterator[tuple[str, RankAdapter]])
    assert_type(fastlora.adapter_parameters(model), Iterator[nn.Parameter])
    assert_type(fastlora.prune(model), dict[str, int])
    assert_type([row.delta_norm for row in fastlora.rank_report(model)], list[float])
    assert_type(fastlora.remove(model), nn.Module)
    fastlora.save_adapter(model, "adapter.safetensors", {"task": "pets"})
    fastlora.inject(model, 16, kapa=0.1)  # type: ignore[call-arg]
    fastlora.inject(model, rank="16")  # type: ignore[arg-type]
    fastlora.injekt(model)  # type: ignore[attr-defined]


def merges(model: nn.Module, weight: Tensor, lora_a: Tensor, lora_b: Tensor, gate: Tensor) -> None:
    residuals: dict[str, Tensor] = {}
    report = fastlora.merge(model, residuals=residuals, rounding="nearest", check=True)
    assert_type(report, fastlora.MergeReport)
    assert_type(report.modules, tuple[ModuleMerge, ...])
    for module in report:
        assert_type(module.unchanged, float)
        assert_type(module.shape, tuple[int, int])
    assert_type(fastlora.unmerge(model, residuals=residuals), fastlora.MergeReport)
    assert_type(fastlora.ops.merge_([weight], [lora_a], [lora_b], [gate], scaling=2.0), fastlora.MergeReport)
    fastlora.merge(model, round="nearest")  # type: ignore[call-arg]
    fastlora.merge(model, seed="0")  # type: ignore[arg-type]


def steps(model: nn.Module, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, gate: Tensor) -> None:
    optimizer = fastlora.optim.ProxAdamW(model, lr=1e-3, betas=(0.9, 0.999), operator="exact")
    fastlora.optim.ProxAdamW([{"params": [lora_a]}, {"params": [gate], "prox": True}], lr=1e-3)
    assert_type(optimizer, fastlora.optim.ProxAdamW)
    schedule = fastlora.optim.KappaSchedule(total=100)
    optimizer.kappa = schedule.kappa(50)
    assert_type(optimizer.kappa, float)
    assert_type(optimizer.step(), None)
    assert_type(optimizer.step(lambda: 1.0), float)
    torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    y = fastlora.ops.rank_lora_linear(x, weight, None, lora_a, lora_b, gate, kappa=0.1)
    assert_type(y, Tensor)
    assert_type(fastlora.explain(x, weight, None, lora_a, lora_b, gate).backend, str)
    optimizer.kappa = None  # type: ignore[assignment]
    fastlora.ops.rank_lora_linear(x, weight, None, lora_a, lora_b)  # type: ignore[call-arg]


def runs(images: Tensor, labels: Tensor) -> None:
    demo = fastlora.open_clip_demo()
    data: MapStyle = TensorDataset(images, labels)
    task = Task("colours", ("red", "blue"), ("a {} square.",), train=data, test=data)
    trainer = Trainer(demo.model, demo.tokenizer, TaskStream("mine", [task]), CoDyRAConfig(rank=8), seed=1)
    assert_type(trainer.fit().tasks, list[str])
    Task("colours", ("red",), ("a {}.",), train=None, test=iter([]))  # type: ignore[arg-type]
