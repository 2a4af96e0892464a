"""Sums that are rounded again and again, undone, and computed again to the same bits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from faults.case import Outcome, group, in_child
from faults.judge import content, right, same
from faults.models import module_lists, their_layers, theirs, trained
from journal.cases import Net, learn, settle, state
from torch import Tensor, nn

import fastlora
from fastlora.ops import merge_, new_residuals, unmerge_
from fastlora.optim import ProxAdamW

numerics = group("numerics")
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def _tasks(count: int, n: int = 192, k: int = 256, norm: float = 2e-4) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """A weight as of a transformer, and updates of rank 8 with elements of this size: ||dW|| = 1 over ViT-B/16's matrices
    is 1.1e-4."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(n, k, generator=generator) / k**0.5
    size = (norm / 8**0.5) ** 0.5
    updates = [
        (torch.randn(8, k, generator=generator) * size, torch.randn(n, 8, generator=generator) * size)
        for _ in range(count)
    ]
    return weight, updates


def _error(held: Tensor, weight: Tensor, total: Tensor) -> float:
    return float((held.double() - weight.double() - total).norm() / total.norm())


def _merge_errors(dtype: torch.dtype, count: int, residual: str) -> tuple[float, float, float]:
    """(error, error of the exact sum cast once, what the reports tell) of the accumulated update, relative."""
    base, updates = _tasks(count)
    base = base.to(dtype)
    weight, total = base.clone(), torch.zeros(base.shape, dtype=torch.float64)
    residuals = None if residual == "none" else new_residuals([weight], int8=residual == "int8")
    told = 0.0
    for a, b in updates:
        report = merge_([weight], [a], [b], [torch.ones(8)], residuals=residuals)
        told += report.modules[0].error_norm
        total += b.double() @ a.double()
    floor = (base.double() + total).to(dtype)
    return _error(weight, base, total), _error(floor, base, total), told / float(total.norm())


def _their_merge_error(dtype: torch.dtype, count: int) -> tuple[float, float]:
    base, updates = _tasks(count)
    base = base.to(dtype)
    model = theirs(nn.Sequential(nn.Linear(base.shape[1], base.shape[0], bias=False, dtype=dtype)), where=["0"], r=8,
                   lora_alpha=8)  # fmt: skip
    layer = their_layers(model)[0]
    layer.get_base_layer().weight.data = base.clone()
    total = torch.zeros(base.shape, dtype=torch.float64)
    for a, b in updates:
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a, b
        layer.merged_adapters = []
        layer.merge()
        total += b.double() @ a.double()
    floor = (base.double() + total).to(dtype)
    return _error(layer.get_base_layer().weight.data, base, total), _error(floor, base, total)


@numerics("at most 1 % above the error of the exact sum, cast once", few=10, many=50)
def many_merges_with_residuals(count: int) -> Outcome:
    """One update after the other is merged into half-precision weights, residuals in the weight's dtype and in int8."""
    counts, ratios = {"merges": count}, []
    for name, dtype in HALVES.items():
        for residual in ("same", "int8"):
            found, floor, _ = _merge_errors(dtype, count, residual)
            counts[f"{name}, {residual}: error %"], counts[f"{name}: floor %"] = 100 * found, 100 * floor
            ratios.append(found / floor)
    return right(
        max(ratios) <= 1.01, f"{max(ratios):.2f} times the floor", f"{max(ratios):.3f} times the floor", **counts
    )


@many_merges_with_residuals.peft
def _(count: int) -> Outcome:
    counts, ratios = {"merges": count}, []
    for name, dtype in HALVES.items():
        found, floor = _their_merge_error(dtype, count)
        counts |= {f"{name}: error %": 100 * found, f"{name}: floor %": 100 * floor}
        ratios.append(found / floor)
    return right(max(ratios) <= 1.01, f"{max(ratios):.1f} times the floor, told nowhere", **counts)


@numerics("the reports tell what rounding took: their sum is never less than the error", few=10, many=50)
def many_merges_without_residuals(count: int) -> Outcome:
    """Rounding to nearest loses small updates in half precision; whoever merges must hear of it."""
    counts, told = {"merges": count}, []
    for name, dtype in HALVES.items():
        found, floor, reported = _merge_errors(dtype, count, "none")
        counts |= {f"{name}: error %": 100 * found, f"{name}: told %": 100 * reported, f"{name}: floor %": 100 * floor}
        told.append(reported / found)
    return right(min(told) >= 0.999, f"the reports tell {min(told):.2f} of the error", "told by the reports", **counts)


@numerics("every bit of the weights as before", few=10, many=10)
def merges_and_unmerges(count: int) -> Outcome:
    """So many merges into float16 and as many unmerges, int8 residuals; bfloat16 by way of a journal."""
    base, updates = _tasks(count)
    weight = base.half()
    before, residuals = weight.clone(), new_residuals([weight], int8=True)
    for a, b in updates:
        merge_([weight], [a], [b], [torch.ones(8)], residuals=residuals)
    for a, b in reversed(updates):
        unmerge_([weight], [a], [b], [torch.ones(8)], residuals=residuals)
    differ = int((weight != before).sum())
    return right(differ == 0, f"{differ} of {weight.numel()} elements differ", entries=weight.numel(), differ=differ)


@merges_and_unmerges.peft
def _(count: int) -> Outcome:
    base, updates = _tasks(count)
    model = theirs(nn.Sequential(nn.Linear(base.shape[1], base.shape[0], bias=False).half()), where=["0"], r=8,
                   lora_alpha=8)  # fmt: skip
    layer = their_layers(model)[0]
    weight = layer.get_base_layer().weight
    weight.data = base.half()
    before = weight.detach().clone()
    for undo in (False, True):
        for a, b in reversed(updates) if undo else updates:
            layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a, b
            layer.merged_adapters = ["default"] if undo else []
            layer.unmerge() if undo else layer.merge()
    differ = int((weight != before).sum())
    share = differ / weight.numel()
    return right(differ == 0, f"{share:.1%} of the entries differ", entries=weight.numel(), differ=differ)


@numerics("the weights after any task, bit for bit", few=3, many=10)
def any_task_of_a_journal(folder: Path, count: int) -> Outcome:
    """So many tasks in float16 and bfloat16, and every state is built again from the untouched base."""
    bad = 0
    for dtype in HALVES.values():
        model, journal = Net(dtype=dtype), fastlora.Journal(folder / str(dtype))
        states = [state(model)]
        for task in range(1, count + 1):
            journal.append(learn(model, task))
            states.append(state(settle(model)))
        for task, expected in enumerate(states):
            rebuilt = Net(dtype=dtype)
            journal.rebuild(rebuilt, after=task)
            bad += not all(same(value, expected[name]) for name, value in rebuilt.state_dict().items())
    return right(not bad, f"{bad} states differ", states=2 * (count + 1))


@numerics("the report tells their share; with residuals the update is whole")
def update_below_the_spacing() -> Outcome:
    """An update that is smaller than half the distance to the next bfloat16 number, merged 100 times."""
    weight, a, b, gate = torch.ones(8, 8).bfloat16(), torch.full((1, 8), 1e-3), torch.ones(8, 1), torch.ones(1)
    plain, carried = weight.clone(), weight.clone()
    residuals = new_residuals([carried])
    reports = [merge_([plain], [a], [b], [gate]) for _ in range(100)]
    for _ in range(100):
        merge_([carried], [a], [b], [gate], residuals=residuals)
    told = all(report.modules[0].unchanged == 1.0 and report.modules[0].relative_error > 0.99 for report in reports)
    return right(told and torch.allclose(carried.float(), torch.tensor(1.1), atol=0.005), "lost without a word")


@update_below_the_spacing.peft
def _() -> Outcome:
    model = theirs(nn.Sequential(nn.Linear(8, 8, bias=False).bfloat16()), where=["0"], r=1, lora_alpha=1)
    layer = their_layers(model)[0]
    layer.get_base_layer().weight.data.fill_(1.0)
    layer.lora_A["default"].weight.data.fill_(1e-3)
    layer.lora_B["default"].weight.data.fill_(1.0)
    for _ in range(100):
        layer.merged_adapters = []
        layer.merge()
    changed = float((layer.get_base_layer().weight.float() - 1.1).abs().max()) < 0.005
    return right(changed, "100 merges changed nothing, and nothing told it")


# ---- the same bits again


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr(content(tensor)).encode())
    return digest.hexdigest()


def _everything(threads: int) -> tuple[str, str]:
    """Hashes of a merge, and of a forward, a backward, an optimizer step; inputs are the same at every call."""
    torch.set_num_threads(threads)
    torch.manual_seed(11)
    lists = module_lists(3, torch.float16, n=200, k=210)
    merge_(*lists)
    stochastic = module_lists(3, torch.bfloat16, n=200, k=210)
    merge_(*stochastic, rounding="stochastic", seed=5)
    merged = _digest([*lists[0], *stochastic[0]])
    layer = trained(k=64, n=48, rank=8, kappa=0.2)
    optimizer = ProxAdamW(layer, lr=0.01)
    optimizer.kappa = 0.05
    x = torch.randn(197, 64, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    optimizer.step()
    return merged, _digest([y, x.grad, *layer.parameters()])


@numerics("one hash", few=8, many=100)
def same_bits_in_every_run(count: int) -> Outcome:
    """Merges (nearest and stochastic), forward, backward and optimizer step in so many processes, with 1 to 4 threads."""
    merges, steps = set(), {}
    for run in range(count):
        threads = 1 + run % 4
        died, result = in_child(lambda t=threads: _everything(t), 60)
        if died or isinstance(result, str):
            return Outcome("crash", died or result[-200:])
        merges.add(result[0])
        steps.setdefault(threads, set()).add(result[1])
    hashes = max(len(found) for found in steps.values())
    across = len(set.union(*steps.values()))
    return right(
        len(merges) == 1 and hashes == 1,
        f"{len(merges)} hashes of merges, {hashes} of steps with one number of threads",
        "one hash of merges for all numbers of threads, one of steps for each",
        runs=count,
        **{"hashes of merges": len(merges), "hashes of steps over all numbers of threads": across},
    )
