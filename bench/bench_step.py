"""One whole training step against the released algorithm, op for op: C5 on ViT-B/16, and the model of the demo.

    pytest bench/bench_step.py             ViT-B/16 with 100 classes (20 minutes, 16 GB), the demo's with 12
    pytest bench/bench_step.py --small     a few images, the demo's model

Every step of rivals/steps.py takes turns; float32, rank 16, every matrix of both towers. The more images, the less the
texts count, which we cut, and the more the products of the image tower, which are the same for all. A ratio on a GPU,
launched and replayed as a CUDA graph: gpu_suite.py, part step (G10).
"""

from __future__ import annotations

import math

import cost
import pytest
import torch
from rivals import steps
from rivals.clip import make_model

C5_TARGET = 0.5
ROUNDS = {"ViT-B/16": 2, "demo": 20}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="C5 is a goal of the CPU")


@pytest.mark.parametrize(
    ("name", "images", "target"), [("ViT-B/16", 16, C5_TARGET), ("ViT-B/16", 64, C5_TARGET), ("demo", 64, None)]
)
def test_c5(goal, small, name, images, target):
    tiny = small or name == "demo"
    model, sizes, _ = make_model(tiny)
    if tiny and not small:
        sizes = sizes._replace(rank=16, classes=12)
    if not small:
        sizes = sizes._replace(images=images)
    model.requires_grad_(False)
    place = steps.OnCpu()
    batch = steps.make_batch(place, sizes)
    calls = {rival: steps.build(rival, place, model, sizes, batch, small=small) for rival in steps.STEPS}
    assert all(math.isfinite(float(call())) for call in calls.values())
    best = cost.fastest(calls, 0.0, rounds=1 if small else ROUNDS[name])
    ours = best.pop("ours")
    for rival, seconds in best.items():
        of_c5 = rival == "as released"
        label = "C5" if of_c5 and target else "  "
        goal(f"{label} step of {name}, {sizes.images} images / {rival}", ours / seconds, target if of_c5 else None)
    goal(f"   seconds of our step of {name}, {sizes.images} images", ours)
