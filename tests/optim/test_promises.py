"""What torch.optim promises of an optimizer: state, hooks, scalers, schedulers."""

import copy
import math
import pickle

import pytest
import torch
from optim.cases import assert_same, make, train
from torch import nn

from fastlora.build import extension
from fastlora.optim import ProxAdamW
from fastlora.reference import soft_threshold


def through_a_file(optimizer, model, tmp_path):
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    fresh = ProxAdamW(model, lr=1.0, operator=optimizer.operator)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
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
