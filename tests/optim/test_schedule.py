"""Thresholds over a task, and the ranks that they leave."""

import math

import pytest
import torch
from torch import nn

import fastlora
from fastlora import FusedRankLoRALinear
from fastlora.optim import KappaSchedule, ProxAdamW


def test_the_published_schedule():
    schedule = KappaSchedule()
    ramp = torch.linspace(0, 0.005, 50, dtype=torch.float64)
    assert [schedule.kappa(t) for t in (0, 249, 250)] == [0, 0, 0]
    for iteration, index in ((251, 1), (254, 1), (255, 2), (259, 2), (490, 49), (499, 49)):
        assert schedule.kappa(iteration) == pytest.approx(float(ramp[index]))
    assert schedule.total_shrink == pytest.approx(0.65, abs=1e-3)
    assert schedule.expected_survival() == pytest.approx(0.516, abs=1e-3)
    assert 16 * schedule.expected_survival() == pytest.approx(8.25, abs=0.01)


@pytest.mark.parametrize("total", [40, 120, 500, 1000])
def test_for_shrink_keeps_the_sparsity_at_any_length(total):
    assert KappaSchedule.for_shrink(0.65, total=total).total_shrink == pytest.approx(0.65)
    assert KappaSchedule.for_shrink(0.65, total=total).kappa(total // 2) == 0.0


@pytest.mark.parametrize("operator", ["exact", "released"])
def test_gates_without_gradient_keep_the_rank_that_the_null_model_predicts(operator):
    # ViT-B/16: 144 modules of rank 16; the released operator also clears what is under kappa_max at the end
    modules = nn.ModuleList(FusedRankLoRALinear(4, 4, rank=16) for _ in range(144))
    generator = torch.Generator().manual_seed(7)
    for module in modules:
        module.reset_adapter_(generator)
    schedule, optimizer = KappaSchedule(), ProxAdamW(modules, lr=5e-4, operator=operator)
    for _, adapter in fastlora.adapters(modules):
        adapter.gate.grad = torch.zeros(16)
    for iteration in range(schedule.total):
        optimizer.kappa = schedule.kappa(iteration)
        optimizer.step()
    shrink = schedule.total_shrink + (schedule.kappa_max if operator == "released" else 0.0)
    survival = math.erfc(shrink / math.sqrt(2))
    kept = sum(fastlora.prune(modules).values()) / 144
    standard_error = math.sqrt(16 * survival * (1 - survival) / 144)
    assert abs(kept - 16 * survival) < 3 * standard_error
    if operator == "exact":
        assert survival == schedule.expected_survival()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kappa_max": -0.1}, "kappa is -0.1"),
        ({"steps": 1}, "steps is 1; a ramp needs at least 2"),
        ({"dense": 1.5}, r"dense is 1.5; it is a share of the iterations, in \[0, 1\]"),
        ({"total": 0}, "total is 0"),
    ],
)
def test_bad_schedules_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        KappaSchedule(**options)


def test_a_schedule_without_proximal_steps_cannot_shrink():
    with pytest.raises(ValueError, match="leaves none for the proximal step"):
        KappaSchedule.for_shrink(0.65, dense=1.0)
