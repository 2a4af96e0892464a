"""One whole training step against the released algorithm, op for op: C5 on ViT-B/16, and the model of the demo.

    pytest bench/bench_step.py             64 images; ViT-B/16 with 100 classes (minutes), the demo's model with 12
    pytest bench/bench_step.py --small     a few images, the demo's model

Ours: packed q, k, v, text cut after the longest prompt, ProxAdamW. As released: q, k, v apart, the whole context, AdamW
and a loop of proximal steps with boolean masks; float32, rank 16, every matrix of both towers. A ratio on a GPU, launched
and replayed as a CUDA graph: gpu_suite.py, part step (G10).
"""

from __future__ import annotations

import copy
import math
import time
from types import SimpleNamespace

import pytest
import torch
from gpu import step
from gpu.clip import adapt_as_released, make_model

import fastlora

C5_TARGET = 0.5
ROUNDS = {"ViT-B/16": 3, "demo": 20}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="C5 is a goal of the CPU")


@pytest.mark.parametrize(("name", "target"), [("ViT-B/16", C5_TARGET), ("demo", None)])
def test_c5(goal, small, name, target):
    tiny = small or name == "demo"
    model, sizes, _ = make_model(tiny)
    if tiny and not small:
        sizes = sizes._replace(rank=16, images=64, classes=12)
    model.requires_grad_(False)
    place = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    batch = step.make_batch(place, sizes)
    makers = (step.ours, step.released)
    steps = [make(place, model, sizes, batch, autocast=False) for make in makers]
    assert all(math.isfinite(float(each())) for each in steps)
    best = [math.inf, math.inf]
    for _ in range(1 if small else ROUNDS[name]):
        for i, each in enumerate(steps):
            start = time.process_time()
            each()
            best[i] = min(best[i], time.process_time() - start)
    label = "C5" if target else "  "
    goal(f"{label} step of {name}, {sizes.images} images / as released", best[0] / best[1], target)
    goal(f"   seconds of our step of {name}", best[0])


def test_both_steps_train_as_many_parameters():
    model, sizes, _ = make_model(True)
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    fastlora.inject(ours, sizes.rank)
    layers = adapt_as_released(theirs, sizes.rank)
    released = sum(p.numel() for layer in layers for p in (layer.lora_A, layer.lora_B, layer.gate))
    assert sum(p.numel() for p in fastlora.adapter_parameters(ours)) == released
