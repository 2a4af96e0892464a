"""When ranks that are dead can leave the model and its optimizer."""

import copy
import math

import pytest
import torch
from optim.cases import make, sizes, train
from torch import nn

import fastlora
from fastlora import FusedRankLoRALinear
from fastlora.optim import KappaSchedule, ProxAdamW, largest_adam_step


def ramp_run(operator, drop, weight_decay=0.0):
    """Three layers through a whole schedule; ranks are removed where it says so."""
    torch.manual_seed(11)
    model = nn.Sequential(*(FusedRankLoRALinear(8, 8, rank=12) for _ in range(3)))
    for _, adapter in fastlora.adapters(model):
        adapter.lora_b.data.normal_(std=0.3)
    schedule = KappaSchedule.for_shrink(0.65, total=120)
    optimizer = ProxAdamW(model, lr=5e-3, operator=operator, weight_decay=weight_decay)
    generator, outputs, dropped = torch.Generator().manual_seed(2), [], 0

    def lr(iteration):
        return 5e-3 * 0.5 * (1 + math.cos(math.pi * iteration / 120))

    first = schedule.exact_from(lr)
    assert 60 < first < 100
    for iteration in range(120):
        if drop and iteration >= first and (iteration - first) % 7 == 0:
            dropped += optimizer.drop_dead_ranks_(model)
        for group in optimizer.param_groups:
            group["lr"] = lr(iteration)
        optimizer.kappa = schedule.kappa(iteration)
        optimizer.zero_grad()
        x = torch.randn(16, 8, generator=generator)
        loss = (model(x) - x.roll(1, dims=1)).square().mean()
        loss.backward()
        optimizer.step()
        outputs.append(loss.detach())
    return model, torch.stack(outputs), dropped


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("operator", ["exact", "released"])
def test_dropping_dead_ranks_changes_nothing_but_the_work(operator, weight_decay):
    small, small_losses, dropped = ramp_run(operator, True, weight_decay)
    whole, whole_losses, _ = ramp_run(operator, False, weight_decay)
    torch.testing.assert_close(small_losses, whole_losses, rtol=1e-4, atol=1e-6)
    ranks = [adapter.gate.numel() for _, adapter in fastlora.adapters(small)]
    assert 0 < sum(ranks) < 36 and dropped > 0
    assert dropped == 36 - sum(ranks)
    for (_, a), (_, b) in zip(fastlora.adapters(small), fastlora.adapters(whole)):
        b.prune_()
        a.prune_()
        assert sizes(a) == sizes(b)
        for p, q in zip((a.lora_a, a.lora_b, a.gate), (b.lora_a, b.lora_b, b.gate)):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    x = torch.randn(5, 8)
    torch.testing.assert_close(small(x), whole(x), rtol=1e-4, atol=1e-5)


def test_dropping_takes_ranks_out_of_parameters_and_state():
    model, optimizer = make()
    train(model, optimizer, 3, 1)
    with torch.no_grad():
        model.gate[[1, 3]] = 0.0
    x, objects = torch.randn(4, 8), (model.lora_a, model.lora_b, model.gate)
    expected, before = model(x), copy.deepcopy(optimizer.state_dict()["state"])
    assert optimizer.drop_dead_ranks_(model) == 2
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
    assert all(a is b for a, b in zip(objects, (model.lora_a, model.lora_b, model.gate)))
    assert sizes(model) == [(3, 8), (6, 3), (3,)]
    kept = [0, 2, 4]
    for number, (p, index) in enumerate(zip(objects, (kept, (slice(None), kept), kept))):
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[p][name], before[number][name][index])
        assert optimizer.state[p]["step"] == before[number]["step"]
    assert optimizer.drop_dead_ranks_(model) == 0
    train(model, optimizer, 2, 3)
    assert float(optimizer.state[model.gate]["step"]) == 5
    with torch.no_grad():
        model.gate.zero_()
    assert optimizer.drop_dead_ranks_(model) == 3 and sizes(model) == [(0, 8), (6, 0), (0,)]
    train(model, optimizer, 2, 4)
    assert optimizer.drop_dead_ranks_(model) == 0 and optimizer.kept_counts().tolist() == [0]


def test_gates_without_an_optimizer_state_are_dropped_too():
    model, optimizer = make()
    model.gate.data[2] = 0.0
    assert optimizer.drop_dead_ranks_(model) == 1 and sizes(model) == [(4, 8), (6, 4), (4,)]
    assert optimizer.drop_dead_ranks_(nn.Linear(2, 2)) == 0


ALL_BETAS = [(0.9, 0.9999), (0.9, 0.999), (0.5, 0.9), (0.9, 0.81), (0.9, 0.5), (0.0, 0.9), (0.0, 0.0), (0.9, 0.0)]


def adam_steps(gradients, betas):
    """Adam's steps in units of lr, float64, eps 0."""
    m, v = gradients.new_zeros(()), gradients.new_zeros(())
    for t, g in enumerate(gradients, start=1):
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        yield float(m / (1 - betas[0] ** t) / (v / (1 - betas[1] ** t)).sqrt()) if v > 0 else 0.0


@pytest.mark.parametrize("betas", ALL_BETAS)
def test_no_gradients_move_a_parameter_further_than_the_bound_and_some_attain_it(betas):
    generator = torch.Generator().manual_seed(0)
    for steps in (1, 2, 7, 60, 300):
        bound = largest_adam_step(steps, betas)
        if math.isfinite(bound) and min(betas) > 0:
            growing = (betas[0] / betas[1]) ** torch.arange(steps - 1, -1, -1, dtype=torch.float64)
            *_, last = adam_steps(growing, betas)
            assert last == pytest.approx(bound, rel=1e-9)
        for gradients in (
            torch.randn(steps, generator=generator, dtype=torch.float64),
            torch.randn(steps, generator=generator, dtype=torch.float64).exp(),
            torch.arange(1, steps + 1) == steps,
        ):
            *_, last = adam_steps(gradients.double(), betas)
            assert abs(last) <= bound * (1 + 1e-12)
    assert largest_adam_step(1, betas) == pytest.approx(1.0)
    assert math.isinf(largest_adam_step(9, betas)) == (0 < betas[0] ** 2 >= betas[1])
    assert math.isinf(bound) == (0 < betas[1] <= betas[0] ** 2 or betas == (0.9, 0.0))


def test_the_bound_of_the_adam_paper_does_not_hold():
    """Why it is not the one in use: with these betas it says 10."""
    growing = 0.9 ** torch.arange(50_000, -1, -1, dtype=torch.float64).clamp_max(2000)
    growing[:-2000] = 0.0
    *_, last = adam_steps(growing, (0.9, 0.9999))
    assert last > 22
    assert last <= largest_adam_step(50_001)


def test_from_which_iteration_on_removal_is_exact():
    schedule = KappaSchedule()

    def lr(iteration):
        return 5e-4 * 0.5 * (1 + math.cos(math.pi * iteration / 500))

    first = schedule.exact_from(lr)
    assert first == 285
    for iteration in range(first, 500):
        assert schedule.kappa(iteration) > lr(iteration) * largest_adam_step(iteration + 1)
    assert schedule.kappa(first - 1) <= 1.001 * lr(first - 1) * largest_adam_step(first)
    # a constant lr that kappa never passes, one that it always passes, and a threshold that is never there
    assert schedule.exact_from(lambda _: 1.0) == 500
    assert schedule.exact_from(lambda _: 1e-9) == 251
    assert KappaSchedule(kappa_max=0.0).exact_from(lambda _: 0.0) == 500
    # a constant threshold, which the last step alone could pass
    sudden = KappaSchedule(1.0, steps=2)
    limit = 1 / (1.001 * largest_adam_step(500))
    assert sudden.exact_from(lambda _: limit * (1 - 1e-9)) == 251
    assert sudden.exact_from(lambda _: limit * (1 + 1e-9)) == 500


@pytest.mark.parametrize("operator", ["exact", "released"])
def test_the_worst_gradients_lift_no_gate_from_zero_after_the_exact_iteration(operator):
    """Gradients that wait, and then push a gate from 0 as hard as they can at each iteration in turn."""
    schedule = KappaSchedule()

    def lr(iteration):
        return 5e-4 * 0.5 * (1 + math.cos(math.pi * iteration / 500))

    first = schedule.exact_from(lr)
    targets = torch.arange(first, 500)
    gate, other = nn.Parameter(torch.zeros(len(targets))), nn.Parameter(torch.zeros(1))
    optimizer = ProxAdamW([{"params": [other]}, {"params": [gate], "prox": True}], lr=1.0, operator=operator)
    for iteration in range(500):
        for group in optimizer.param_groups:
            group["lr"] = lr(iteration)
        optimizer.kappa = schedule.kappa(iteration)
        distance = (targets - iteration).double()
        gate.grad = torch.where(distance >= 0, (0.9 / 0.9999) ** distance, 0.0).float()
        with torch.no_grad():
            gate.copy_(torch.where(targets >= iteration, 0.0, gate))  # at 0 until its own iteration
        optimizer.step()
        assert iteration < first or gate.eq(0).all()
