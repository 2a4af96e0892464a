import copy
import math
import pickle

import pytest
import torch
from torch import nn

import fastlora
from fastlora import FusedRankLoRALinear
from fastlora.build import extension
from fastlora.optim import KappaSchedule, ProxAdamW, largest_adam_step
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


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"betas": (0.3, 0.99)}], ids=str)
@pytest.mark.parametrize("operator", ["exact", "released"])
def test_a_step_is_adamw_then_the_reference_prox_bit_for_bit(exact_sqrt, operator, options):
    if extension() is None:
        pytest.skip("the extension was not built, so that the step is torch's")
    ours, twin = layer(), layer()
    optimizer = ProxAdamW(ours, lr=1e-2, operator=operator, **options)
    parameters = [twin.lora_a, twin.lora_b, twin.gate]
    # foreach=False: the operations of foreach, with a sqrt that the fixture can replace
    options = {"betas": (0.9, 0.9999), "weight_decay": 0.0} | options
    plain = torch.optim.AdamW(parameters, lr=1e-2, foreach=False, **options)
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


# ---- what torch.optim promises of an optimizer


def sizes(model):
    return [tuple(p.shape) for p in (model.lora_a, model.lora_b, model.gate)]


def train(model, optimizer, steps, seed, before_step=None):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 8, generator=generator)).square().sum().backward()
        if before_step:
            before_step()
        optimizer.step()


def assert_same(a, b):
    for p, q in zip(a.parameters(), b.parameters()):
        assert torch.equal(p, q)


def make(model=None, **options):
    model = model or layer()
    optimizer = ProxAdamW(model, lr=1e-2, **options)
    optimizer.kappa = 0.01
    return model, optimizer


def through_a_file(optimizer, model, tmp_path):
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    fresh = ProxAdamW(model, lr=1.0, operator=optimizer.operator)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt"))
    return fresh


def through_pickle(optimizer, model, tmp_path):
    made = pickle.loads(pickle.dumps((optimizer, list(model.parameters()))))
    for p, q in zip(model.parameters(), made[1]):
        assert torch.equal(p, q)
    return made[0]


def through_deepcopy(optimizer, model, tmp_path):
    return copy.deepcopy((optimizer, model))[0]


@pytest.mark.parametrize("way", [through_a_file, through_pickle, through_deepcopy])
@pytest.mark.parametrize("operator", ["exact", "released"])
def test_a_resumed_run_has_the_same_bits(way, operator, tmp_path):
    whole, optimizer = make(operator=operator)
    train(whole, optimizer, 5, 1)
    if way is through_a_file:
        resumed = copy.deepcopy(whole)
        second = way(optimizer, resumed, tmp_path)
    else:
        resumed, second = copy.deepcopy(whole), way(optimizer, whole, tmp_path)
        # the copy has parameters of its own: let the layer use them
        parts = [p for group in second.param_groups for p in group["params"]]
        resumed.lora_a, resumed.lora_b, resumed.gate = parts
    assert second.operator == operator and second.kappa == 0.01
    train(whole, optimizer, 5, 2)
    train(resumed, second, 5, 2)
    assert_same(whole, resumed)
    assert second.why_not == optimizer.why_not


def test_state_goes_to_torch_and_comes_back():
    ours, optimizer = make()
    train(ours, optimizer, 4, 1)
    theirs = copy.deepcopy(ours)
    groups = [{"params": [theirs.lora_a, theirs.lora_b]}, {"params": [theirs.gate]}]
    plain = torch.optim.AdamW(groups, lr=1.0)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert plain.param_groups[0]["lr"] == 1e-2 and plain.param_groups[0]["betas"] == (0.9, 0.9999)
    optimizer.kappa = 0.0
    train(ours, optimizer, 4, 2)
    train(theirs, plain, 4, 2)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    # a state_dict of torch's does not know gates or kappa
    plain.param_groups[0].pop("prox"), plain.param_groups[1].pop("prox"), plain.param_groups[1].pop("kappa")
    back, again = make(copy.deepcopy(theirs))
    again.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert again.kappa == 0.01 and [group["prox"] for group in again.param_groups] == [False, True]
    again.kappa = 0.0
    train(theirs, plain, 4, 3)
    train(back, again, 4, 3)
    for p, q in zip(back.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    assert float(again.state[back.gate]["step"]) == 12


def test_grad_scaler_clipping_and_scheduler():
    ours, optimizer = make()
    twin, second = make()
    scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**10)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(each, 10) for each in (optimizer, second)]
    for step in range(8):
        x = torch.randn(4, 8)
        if step == 3:
            x[0, 0] = math.inf  # the scaler leaves this step out
        optimizer.zero_grad(), second.zero_grad()
        scaler.scale(ours(x).square().sum()).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        if step != 3:
            twin(x).square().sum().backward()
            torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
            second.step()
        for scheduler in schedulers:
            scheduler.step()
    for p, q in zip(ours.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert optimizer.param_groups[0]["lr"] == second.param_groups[0]["lr"] < 1e-2


def test_closure_hooks_and_a_further_group():
    torch.optim.AdamW(
        [nn.Parameter(torch.ones(1))]
    )  # wraps AdamW.step for hooks, which ours must not pass through twice
    model, optimizer = make()
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("pre"))
    optimizer.register_step_post_hook(lambda *_: called.append("post"))
    extra = nn.Parameter(torch.tensor([0.001, 2.0]))
    optimizer.add_param_group({"params": [extra], "prox": True, "lr": 0.0})
    optimizer.add_param_group({"params": [other := nn.Parameter(torch.ones(2))]})
    assert optimizer.param_groups[2]["kappa"] == 0.01 and optimizer.param_groups[3]["prox"] is False

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(4, 8)).square().sum() + extra.sum() + other.sum()
        loss.backward()
        return loss

    for options in ({}, {"maximize": True}):  # one launch, and torch's own
        optimizer.param_groups[0].update(options)
        called.clear()
        assert optimizer.step(closure).requires_grad
        assert called == ["pre", "post"]
        assert bool(optimizer.why_not) == bool(options) or extension() is None
    assert extra[0] == 0 and 1.97 < extra[1] < 1.99 and other[0] < 1


def test_half_precision_parameters_are_left_to_torch_and_thresholded():
    gate, weight = (
        nn.Parameter(torch.randn(6, dtype=torch.bfloat16)),
        nn.Parameter(torch.randn(3, dtype=torch.bfloat16)),
    )
    optimizer = ProxAdamW([{"params": [weight]}, {"params": [gate], "prox": True}], lr=1e-2)
    twins = [nn.Parameter(p.detach().clone()) for p in (weight, gate)]
    plain = torch.optim.AdamW(twins, lr=1e-2, betas=(0.9, 0.9999), weight_decay=0.0)
    optimizer.kappa = 0.3
    for p, q in zip((weight, gate), twins):
        p.grad = torch.ones_like(p)
        q.grad = torch.ones_like(q)
    optimizer.step(), plain.step()
    assert "not float32" in optimizer.why_not
    assert torch.equal(weight, twins[0]) and torch.equal(gate, soft_threshold(twins[1].detach(), 0.3))
    assert optimizer.kept_counts().tolist() == [int(torch.count_nonzero(gate))]


def test_kept_counts_are_those_of_the_last_step():
    model, optimizer = make()
    assert optimizer.kept_counts().tolist() == [5]
    optimizer.kappa = 0.5
    train(model, optimizer, 1, 1)
    counts = optimizer.kept_counts()
    assert counts.tolist() == [int(torch.count_nonzero(model.gate))] != [5]
    optimizer.kappa = 100.0
    train(model, optimizer, 1, 1)
    assert optimizer.kept_counts().tolist() == [0] != counts.tolist()


def test_a_reset_adapter_goes_on_with_its_state():
    """As with torch: the parameters are the same objects, whatever memory they lie in now."""
    model, optimizer = make()
    train(model, optimizer, 3, 1)
    twin = copy.deepcopy(model)
    plain = torch.optim.AdamW([{"params": [twin.lora_a, twin.lora_b]}, {"params": [twin.gate]}], lr=1.0)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.kappa = 0.0
    for each, opt in ((model, optimizer), (twin, plain)):
        each.reset_adapter_(torch.Generator().manual_seed(4))
        train(each, opt, 3, 2)
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


# ---- dead ranks


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
