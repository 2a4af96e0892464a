"""A step is AdamW, then the proximal step on the gates."""

import copy

import pytest
import torch
from optim.cases import layer
from torch import nn

from fastlora import FusedRankLoRALinear
from fastlora.build import extension
from fastlora.optim import ProxAdamW
from fastlora.reference import soft_threshold


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
