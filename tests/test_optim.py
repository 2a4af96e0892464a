import copy
import math

import pytest
import torch
from torch import nn

import fastlora
from fastlora import FusedRankLoRALinear
from fastlora.build import extension
from fastlora.optim import KappaSchedule, ProxAdamW
from fastlora.reference import soft_threshold


def layer():
    torch.manual_seed(3)
    made = FusedRankLoRALinear(8, 6, rank=5)
    made.lora_b.data.normal_()
    return made


@pytest.fixture
def exact_sqrt(monkeypatch):
    """torch.sqrt rounded to nearest: on a CPU it may be MKL's, whose last bit is off for one value in five."""
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda t: torch.sqrt(t.double()).to(t.dtype))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("operator", ["exact", "released"])
def test_a_step_is_adamw_then_the_reference_prox_bit_for_bit(exact_sqrt, operator, weight_decay):
    if extension() is None:
        pytest.skip("the extension was not built, so that the step is torch's")
    ours, twin = layer(), layer()
    optimizer = ProxAdamW(ours, lr=1e-2, operator=operator, weight_decay=weight_decay)
    parameters = [twin.lora_a, twin.lora_b, twin.gate]
    # foreach=False: the operations of foreach, with a sqrt that the fixture can replace
    plain = torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.9999), weight_decay=weight_decay, foreach=False)
    for step in range(60):
        x = torch.randn(4, 8)
        optimizer.kappa = 0.0 if step < 20 else 0.03
        for model, opt in ((ours, optimizer), (twin, plain)):
            opt.zero_grad()
            model(x).square().sum().backward()
            opt.step()
        assert optimizer.why_not == ""
        with torch.no_grad():
            twin.gate.copy_(soft_threshold(twin.gate, optimizer.kappa, operator=operator))
        for a, b in ((ours.lora_a, twin.lora_a), (ours.lora_b, twin.lora_b), (ours.gate, twin.gate)):
            assert torch.equal(a, b)
            assert all(torch.equal(optimizer.state[a][name], plain.state[b][name]) for name in plain.state[b])
    assert ours.active_rank() < 5, "the threshold was never at work"


def test_kappa_zero_is_plain_adamw_and_kappa_is_in_the_state():
    ours = layer()
    optimizer = ProxAdamW(ours, lr=1e-2)
    assert optimizer.kappa == 0.0
    optimizer.kappa = 0.25
    ours(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    resumed = ProxAdamW(copy.deepcopy(ours), lr=1.0)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.kappa == 0.25 and resumed.param_groups[0]["lr"] == 1e-2


def test_frozen_gates_and_own_groups():
    ones = FusedRankLoRALinear(8, 6, rank=5, gate_init="ones")
    ones.gate.requires_grad_(False)
    optimizer = ProxAdamW(ones, lr=1e-2)
    optimizer.kappa = 0.5
    ones(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    assert ones.gate.eq(1).all()
    own = layer()
    groups = [{"params": [own.lora_a, own.lora_b]}, {"params": [own.gate], "prox": True, "lr": 0.1}]
    optimizer = ProxAdamW(groups, lr=1e-2)
    own.gate.data.fill_(0.3)
    optimizer.kappa = 1.0
    own(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    assert own.gate.eq(0).all() and own.lora_a.ne(0).all()


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="Linear has no trainable adapter"):
        ProxAdamW(nn.Linear(2, 2), lr=1e-3)
    with pytest.raises(ValueError, match="do not say which of them are gates"):
        ProxAdamW(layer().parameters(), lr=1e-3)
    with pytest.raises(ValueError, match="operator 'soft' is unknown"):
        ProxAdamW(layer(), lr=1e-3, operator="soft")
    optimizer = ProxAdamW(layer(), lr=1e-3)
    with pytest.raises(ValueError, match="kappa is -1"):
        optimizer.kappa = -1.0
    assert optimizer.kappa == 0.0


def test_the_published_schedule():
    schedule = KappaSchedule()
    ramp = torch.linspace(0, 0.005, 50, dtype=torch.float64)
    assert [schedule.kappa(t) for t in (0, 249, 250)] == [0, 0, 0]
    for iteration, index in ((251, 1), (254, 1), (255, 2), (259, 2), (490, 49), (499, 49)):
        assert schedule.kappa(iteration) == pytest.approx(float(ramp[index]))
    assert schedule.total_shrink == pytest.approx(0.65, abs=1e-3)
    assert schedule.expected_survival() == pytest.approx(0.516, abs=1e-3)
    assert 16 * schedule.expected_survival() == pytest.approx(8.25, abs=0.01)


def test_after_its_third_step_the_ramp_is_above_what_adam_can_move():
    schedule = KappaSchedule()
    for iteration in range(266, 500):
        largest_step = 5e-4 * 0.5 * (1 + math.cos(math.pi * iteration / 500))
        assert schedule.kappa(iteration) > largest_step


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
