"""Numbers at the ends of their formats, thresholds met exactly, and gradients that are not finite."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from faults.bad_merges import their_bases, their_merge
from faults.case import Outcome, group
from faults.judge import content, harm, refused, right, same, worst
from faults.models import RANK, K, module_lists, operands, ours, their_layers, theirs, trained
from torch import Tensor, nn

import fastlora
from fastlora import reference
from fastlora.ops import merge_, rank_lora_linear, soft_threshold
from fastlora.optim import ProxAdamW

numerics = group("numerics")
LIMITS = {torch.float16: 65504.0, torch.bfloat16: 3.38e38, torch.float32: 3.4e38}


# ---- the ends of the formats


def _near_the_limit(dtype: torch.dtype) -> nn.Module:
    """One element of the second weight is as large as its format has it."""
    model = nn.Sequential(nn.Linear(K, K, bias=False), nn.Linear(K, K, bias=False)).to(dtype)
    model[1].weight.data[0, 0] = LIMITS[dtype]
    return model


def _to_the_limit(lora_a: Tensor, lora_b: Tensor, dtype: torch.dtype, here: bool) -> None:
    """An update of one element: a quarter of the largest number, or 1."""
    lora_a.data.zero_()
    lora_b.data.zero_()
    lora_a.data[0, 0], lora_b.data[0, 0] = 1.0, LIMITS[dtype] / 4 if here else 1.0


@numerics("an error that names the module, the count and the limit; not one byte of any weight has changed")
def overflow_in_a_merge() -> Outcome:
    """weight + update is beyond float16, bfloat16 or float32, in the only module or in the second."""
    outcomes = []
    for dtype in LIMITS:
        model = ours(_near_the_limit(dtype), where=["0", "1"], gate_init="ones")
        for place, (_, adapter) in enumerate(fastlora.adapters(model)):
            _to_the_limit(adapter.lora_a, adapter.lora_b, dtype, place == 1)
        told = ("1: 1 of 36 results are not finite", str(dtype)[6:])
        outcomes.append(refused(lambda m=model: fastlora.merge(m), *told, keeps=[model]))
        outcomes.append(refused(model[1].merge_, "1 of 36 results are not finite", keeps=[model]))
    return worst(outcomes)


@overflow_in_a_merge.peft
def _() -> Outcome:
    outcomes = []
    for dtype in LIMITS:
        model = theirs(_near_the_limit(dtype), where=["0", "1"])
        for place, layer in enumerate(their_layers(model)):
            _to_the_limit(layer.lora_A["default"].weight, layer.lora_B["default"].weight, dtype, place == 1)
        outcomes.append(their_merge(model, "nan"))
    return worst(outcomes)


def _small(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights and updates below the smallest normal number of float16."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(64, 48, generator=generator) * 2e-5).half()
    a, b = torch.randn(RANK, 48, generator=generator) * 1e-3, torch.randn(64, RANK, generator=generator) * 1e-2
    return weight, a, b, torch.ones(RANK)


def _exact(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return (weight.double() + b.double() @ a.double()).to(weight.dtype)


def _ulps_off(found: Tensor, exact: Tensor) -> Tensor:
    return (found.view(torch.int16).int() - exact.view(torch.int16).int()).abs()


@numerics("the exact sum, rounded once; at most a few of ten thousand elements one unit off")
def denormals_in_a_merge() -> Outcome:
    """Weights and sums below the smallest normal float16, and torch.set_flush_denormal(True) besides."""
    weight, a, b, gate = _small()
    exact, found = _exact(weight, a, b), []
    for flush in (False, True):
        merged = weight.clone()
        torch.set_flush_denormal(flush)
        merge_([merged], [a], [b], [gate])
        torch.set_flush_denormal(False)
        found.append(merged)
    off = (found[0] != exact).double().mean()
    fine = off < 1e-3 and _ulps_off(found[0], exact).max() <= 1 and same(*found)
    return right(fine, f"{off:.1%} of the elements are off, the same with flushing: {same(*found)}", off=float(off))


@denormals_in_a_merge.peft
def _() -> Outcome:
    weight, a, b, _ = _small()
    model = theirs(nn.Sequential(nn.Linear(48, 64, bias=False).half()), where=["0"])
    layer = their_layers(model)[0]
    layer.get_base_layer().weight.data = weight.clone()
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a, b
    model.merge_adapter()
    merged, exact = layer.get_base_layer().weight.data, _exact(weight, a, b)
    off, most = (merged != exact).double().mean(), int(_ulps_off(merged, exact).max())
    return right(off < 1e-3, f"{off:.1%} of the elements are off, by up to {most} units", off=float(off))


@numerics("not one bit of the weight changes, and gates of -0.0 are dead everywhere")
def update_of_zero() -> Outcome:
    """Gates of 0 and -0.0, and a lora_b of 0, merged into weights of -0.0 and of NaN payloads of their own."""
    bits = torch.tensor([0x8000, 0x0000, 0x0001, 0x7BFF, 0x3C00], dtype=torch.int32).to(torch.int16)
    outcomes = []
    for dtype in (torch.float16, torch.bfloat16):
        weight = bits.view(dtype).repeat(12, 2)
        before = weight.clone()
        _, a, b, _ = module_lists(1)
        for lora_b, gate in ((b[0], torch.tensor([0.0, -0.0, 0.0, -0.0])), (torch.zeros(12, RANK), torch.ones(RANK))):
            report = merge_([weight], a, [lora_b], [gate])
            outcomes.append(right(same(weight, before), f"bits of {dtype} changed"))
            outcomes.append(right(report.modules[0].delta_norm == 0, "a dead rank is in the report"))
    layer = trained()
    layer.gate.data = torch.tensor([0.0, -0.0, 1e-40, -1e-40])
    alive = layer.active_rank(), layer.prune_()
    return worst([*outcomes, right(alive == (2, 2), f"ranks {alive}")])


@update_of_zero.peft
def _() -> Outcome:
    model = theirs(nn.Sequential(nn.Linear(10, 12, bias=False).half()), where=["0"], size=0.0)
    weight = their_bases(model)[0]
    weight.data = torch.tensor([0x8000, 0x0000, 0x0001, 0x7BFF, 0x3C00], dtype=torch.int32).to(torch.int16).view(
        torch.float16
    ).repeat(12, 2)  # fmt: skip
    before = weight.detach().clone()
    model.merge_adapter()
    return right(torch.equal(weight, before), "an adapter of zeros changes the weight")


@numerics("infinity where the sum is beyond the format, as PyTorch has it, and the right number elsewhere")
def overflow_in_a_forward() -> Outcome:
    """A row of x at the end of float16."""
    given = [t.half() if t.dim() == 2 or i == 2 else t for i, t in enumerate(operands())]
    given[0][1] = 60000.0
    found, expected = rank_lora_linear(*given, 0.1), reference.rank_lora_linear(*given, 0.1)
    rows = [0, 2, 3]
    return right(
        torch.allclose(found[rows], expected[rows], atol=0.05, rtol=0.01) and not found[1].isfinite().all(),
        "other rows are spoilt, or the overflow is hidden",
    )


# ---- thresholds and gradients


@numerics("gates at the threshold are dead in forward, gradient, active_rank, prune and merge alike")
def kappa_exactly_at_gate_values() -> Outcome:
    """Gates of +kappa, -kappa, the float32 next to them, and 0."""
    kappa, next_up = 0.25, float(torch.nextafter(torch.tensor(0.25), torch.tensor(1.0)))
    layer = trained(rank=6)
    layer.gate.data = torch.tensor([kappa, -kappa, 0.0, next_up, -next_up, 1.0])
    layer.kappa = kappa
    x = torch.randn(8, K)
    y = layer(x)
    (grad,) = torch.autograd.grad(y.square().sum(), [layer.gate])
    dead = [grad[i] == 0 for i in range(3)] + [grad[i] != 0 for i in range(3, 6)]
    alive, twin = layer.active_rank(), copy.deepcopy(layer)
    report = twin.merge_()
    merged = torch.allclose(torch.nn.functional.linear(x, twin.weight, twin.bias), y, atol=1e-5)
    kept = layer.prune_()
    counts = (alive, report.modules[0].kept_rank, kept)
    fine = all(dead) and merged and torch.allclose(layer(x), y, atol=1e-6) and counts == (3, 3, 3)
    below = float(torch.nextafter(torch.tensor(0.5), torch.tensor(0.0)))
    released = soft_threshold(torch.tensor([0.25, below, -below, 0.5]), 0.25, operator="released").tolist()
    fine = fine and released == [0.25, 0.0, 0.0, 0.25]  # as published: its dead zone lies between kappa and 2 kappa
    return right(fine, f"counts {counts}, gradients {grad.tolist()}, released {released}")


def _scaled_step(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any, factor: float) -> None:
    optimizer.zero_grad()
    loss = model(torch.randn(4, K)).square().sum() * factor
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


def _skips(model: nn.Module, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> Outcome:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    _scaled_step(model, optimizer, scaler, 1.0)
    before, scale = [content(p) for p in parameters], scaler.get_scale()
    _scaled_step(model, optimizer, scaler, 1e38)
    if [content(p) for p in parameters] != before or scaler.get_scale() != scale / 2:
        return harm("a step of infinite gradients was taken")
    _scaled_step(model, optimizer, scaler, 1.0)
    moved = [content(p) for p in parameters] != before
    return right(moved and all(bool(p.isfinite().all()) for p in parameters), "training does not go on")


@numerics("the step is skipped as a whole, the proximal step too; the scale is halved; the next step is taken")
def gradients_that_overflow() -> Outcome:
    """Gradients of float16 training are infinite under torch.amp.GradScaler."""
    model = ours()
    optimizer = ProxAdamW(model, lr=0.01)
    optimizer.kappa = 0.001
    return _skips(model, optimizer, list(fastlora.adapter_parameters(model)))


@gradients_that_overflow.peft
def _() -> Outcome:
    model = theirs()
    trained_ = [p for p in model.parameters() if p.requires_grad]
    return _skips(model, torch.optim.AdamW(trained_, lr=0.01), trained_)


@numerics("the next merge, prune and save name the adapter; no weight has changed")
def step_on_gradients_that_are_not_finite(folder: Path) -> Outcome:
    """An optimizer step on NaN gradients, without a scaler."""
    model = ours()
    optimizer = ProxAdamW(model, lr=0.01)
    (model(torch.randn(4, K)).sum() * float("nan")).backward()
    optimizer.step()
    weights = [model[0].weight, model[2].weight]
    journal = fastlora.Journal(folder / "journal")
    return worst(
        [
            refused(lambda: fastlora.merge(model), "0", "non-finite", keeps=weights),
            refused(lambda: fastlora.prune(model), "0.gate", "non-finite", keeps=weights),
            refused(lambda: journal.append(model), "0.lora_a", "non-finite", keeps=[*weights, folder]),
        ]
    )


@step_on_gradients_that_are_not_finite.peft
def _() -> Outcome:
    model = theirs()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    (model(torch.randn(4, K)).sum() * float("nan")).backward()
    optimizer.step()
    return their_merge(model, "nan")
