"""One adapted layer, forward and backward: ours, PEFT, and the formula as the released CoDyRA code writes it.

    pytest bench/bench_rank_lora.py                      times, C1 and C2 against their targets
    pytest bench/bench_rank_lora.py --small              tiny shapes

Single thread, process time. Every rival is checked against the float64 definition before it is timed.
"""

from __future__ import annotations

import peft
import pytest
import torch
from shapes import CPU_SHAPES, SMALL_SHAPES, Shape
from torch import nn

from fastlora import FusedRankLoRALinear, reference

# goals C1 and C2: forward + backward against PEFT; bytes saved for backward against the bytes of x
C1_TARGETS = {"b16-proj": 0.93, "b16-fc1": 0.85}
C2_TARGET = 1.022
RIVALS = ("fastlora", "peft", "as released", "frozen linear")


def build(rival: str, shape: Shape) -> nn.Module:
    """The same function of x in each case: gates are one for PEFT, which has none."""
    torch.manual_seed(0)
    linear = nn.Linear(shape.k, shape.n)
    layer = FusedRankLoRALinear.from_linear(linear, shape.r, gate_init="ones")
    layer.lora_b.data.normal_(std=0.1)
    if rival == "fastlora":
        return layer
    if rival == "peft":
        return _peft(linear, layer, shape)
    if rival == "as released":
        return _AsReleased(layer)
    return linear.requires_grad_(False)


def _peft(linear: nn.Linear, layer: FusedRankLoRALinear, shape: Shape) -> nn.Module:
    config = peft.LoraConfig(r=shape.r, lora_alpha=shape.r, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(shape.k, shape.n)), config)
    adapted = model.base_model.model[0]
    adapted.base_layer.load_state_dict(linear.state_dict())
    adapted.lora_A["default"].weight.data.copy_(layer.lora_a)
    adapted.lora_B["default"].weight.data.copy_(layer.lora_b)
    return adapted


class _AsReleased(nn.Module):
    def __init__(self, layer: FusedRankLoRALinear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_A, self.lora_B = nn.Parameter(layer.lora_a.detach()), nn.Parameter(layer.lora_b.detach())
        self.gate = nn.Parameter(layer.gate.detach()[None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        update = (x @ self.lora_A.t()).mul(self.gate) @ self.lora_B.t()
        return nn.functional.linear(x, self.weight, self.bias) + update


def step(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor):
    """A call that runs forward and backward; gradients are dropped, as an optimizer step would."""

    def run() -> torch.Tensor:
        for parameter in layer.parameters():
            parameter.grad = None
        x.grad = None
        y = layer(x)
        y.backward(dy)
        return y

    return run


def make_step(rival: str, shape: Shape):
    layer = build(rival, shape)
    torch.manual_seed(1)
    x = torch.randn(shape.m, shape.k, requires_grad=True)
    run = step(layer, x, torch.randn(shape.m, shape.n))
    if rival != "frozen linear":
        _check(run(), shape, x)
    return run


def _check(y: torch.Tensor, shape: Shape, x: torch.Tensor) -> None:
    ours = build("fastlora", shape)
    operands = (ours.weight, ours.bias, ours.lora_a, ours.lora_b, ours.gate)
    truth = reference.rank_lora_linear(x.detach().double(), *(t.detach().double() for t in operands))
    torch.testing.assert_close(y.detach().double(), truth, atol=1e-4, rtol=1e-4)


def pytest_generate_tests(metafunc):
    if "shape" in metafunc.fixturenames:
        shapes = SMALL_SHAPES if metafunc.config.getoption("--small") else CPU_SHAPES
        metafunc.parametrize("shape", shapes, ids=str)


@pytest.mark.parametrize("rival", RIVALS)
def test_forward_and_backward(benchmark, facts, rival, shape):
    benchmark.group = f"forward + backward {shape}"
    flops = 4 * shape.m * shape.k * shape.n
    benchmark.extra_info.update(facts, dtype="float32", shape=str(shape), base_flops=flops)
    benchmark(make_step(rival, shape))


def test_c1_ratio_to_peft(ratio, goal, shape):
    goal(f"C1 fwd+bwd / PEFT, {shape}", _to_peft(ratio, "fastlora", shape), C1_TARGETS.get(shape.name, 0.93))


@pytest.mark.parametrize("rival", ["frozen linear", "as released"])
def test_c1_of_the_limit_and_of_the_formula_as_written(ratio, goal, shape, rival):
    goal(f"   the same for {rival}, {shape}", _to_peft(ratio, rival, shape))


def _to_peft(ratio, rival: str, shape: Shape) -> float:
    return ratio(make_step(rival, shape), make_step("peft", shape))


def saved_bytes(layer: nn.Module, x: torch.Tensor) -> int:
    """Bytes that a forward keeps for its backward, parameters aside; memory that is shared counts once."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
        del y
    return sum(kept.values())


@pytest.mark.parametrize("rival", ["fastlora", "peft", "as released"])
def test_c2_saved_bytes(goal, rival, shape):
    x = torch.randn(shape.m, shape.k, requires_grad=True)
    share = saved_bytes(build(rival, shape), x) / (x.numel() * x.element_size())
    if rival == "fastlora":
        assert share == 1 + shape.r / shape.k
        goal(f"C2 saved bytes / bytes of x, {shape}", share, C2_TARGET)
    else:
        goal(f"   the same for {rival}, {shape}", share)
