"""Sums that are rounded again and again, undone, and computed again to the same bits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

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
ONES = torch.ones(8)
Update = tuple[Tensor, Tensor]


def _tasks(count: int, n: int = 64, k: int = 768, norm: float = 1.0) -> tuple[Tensor, list[Update]]:
    """A weight as of a transformer, and lora_a and lora_b of rank 8: updates whose norm over all matrices of ViT-B/16 would
    be `norm`."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(n, k, generator=generator) / k**0.5
    size = (norm / 122_683_392**0.5 / 8**0.5) ** 0.5
    return weight, [
        (torch.randn(8, k, generator=generator) * size, torch.randn(n, 8, generator=generator) * size)
        for _ in range(count)
    ]


class Ours:
    """merge_ and unmerge_ into one weight, with residuals in its dtype, in int8, or without."""

    def __init__(self, weight: Tensor, residual: str) -> None:
        self.weight, self.told = weight.clone(), 0.0
        self._options = {} if residual == "none" else {"residuals": new_residuals([weight], int8=residual == "int8")}

    def add(self, a: Tensor, b: Tensor) -> None:
        self.told += merge_([self.weight], [a], [b], [ONES], **self._options).modules[0].error_norm

    def take(self, a: Tensor, b: Tensor) -> None:
        unmerge_([self.weight], [a], [b], [ONES], **self._options)


class Theirs:
    """PEFT's merge and unmerge into one weight, adapters in float32, its default."""

    def __init__(self, weight: Tensor) -> None:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        self._layer = their_layers(theirs(nn.Sequential(linear), where=["0"], r=8, lora_alpha=8))[0]
        self.weight = self._layer.get_base_layer().weight.data = weight.clone()

    def _holds(self, a: Tensor, b: Tensor, merged: list[str]) -> None:
        self._layer.lora_A["default"].weight.data, self._layer.lora_B["default"].weight.data = a, b
        self._layer.merged_adapters = merged

    def add(self, a: Tensor, b: Tensor) -> None:
        self._holds(a, b, [])
        self._layer.merge()

    def take(self, a: Tensor, b: Tensor) -> None:
        self._holds(a, b, ["default"])
        self._layer.unmerge()


def _errors(
    make: Callable[[Tensor], Any], dtype: torch.dtype, count: int
) -> tuple[Any, dict[int, tuple[float, float]]]:
    """What merged, and by number of merges its relative error and that of the exact sum, cast once: 10 and `count`."""
    base, updates = _tasks(count)
    base = base.to(dtype)
    runner, total, found = make(base), torch.zeros(base.shape, dtype=torch.float64), {}
    for merges, (a, b) in enumerate(updates, start=1):
        runner.add(a, b)
        total += b.double() @ a.double()
        if merges in (10, count):
            once = (base.double() + total).to(dtype)
            off = ((held.double() - base.double() - total).norm() / total.norm() for held in (runner.weight, once))
            found[merges] = tuple(map(float, off))
    return runner, found


def _told(counts: dict[str, float], name: str, errors: dict[int, tuple[float, float]]) -> float:
    """Percentages into `counts`; the largest ratio of error to floor."""
    for merges, (error, floor) in errors.items():
        counts |= {f"{name}, {merges} merges, %": 100 * error, f"{name}, cast once, {merges} merges, %": 100 * floor}
    return max(error / floor for error, floor in errors.values())


@numerics("at most 1 % above the error of the exact sum, cast once", few=10, many=50)
def many_merges_with_residuals(count: int) -> Outcome:
    """One update after the other is merged into half-precision weights, residuals in the weight's dtype and in int8."""
    counts: dict[str, float] = {}
    ratio = max(
        _told(counts, f"{name}, {residual}", _errors(lambda w, r=residual: Ours(w, r), dtype, count)[1])
        for name, dtype in HALVES.items()
        for residual in ("same", "int8")
    )
    return right(ratio <= 1.01, f"{ratio:.2f} times the floor", f"{ratio:.3f} times the floor", **counts)


@many_merges_with_residuals.peft
def _(count: int) -> Outcome:
    counts: dict[str, float] = {}
    ratio = max(_told(counts, name, _errors(Theirs, dtype, count)[1]) for name, dtype in HALVES.items())
    return right(ratio <= 1.01, f"{ratio:.1f} times the floor, told nowhere", **counts)


@numerics("the reports tell what rounding took: their sum is never less than the error", few=10, many=50)
def many_merges_without_residuals(count: int) -> Outcome:
    """Rounding to nearest loses small updates in half precision; whoever merges must hear of it."""
    counts: dict[str, float] = {}
    base, updates = _tasks(count)
    told = []
    for name, dtype in HALVES.items():
        runner, errors = _errors(lambda weight: Ours(weight, "none"), dtype, count)
        _told(counts, name, errors)
        norm = float(sum(b.double() @ a.double() for a, b in updates).norm())
        told.append(runner.told / norm / errors[count][0])
    return right(min(told) >= 0.999, f"the reports tell {min(told):.2f} of the error", "told by the reports", **counts)


def _undone(make: Callable[[Tensor], Any], dtype: torch.dtype, count: int) -> tuple[int, int]:
    """(elements, how many of them differ after so many merges and as many unmerges)."""
    base, updates = _tasks(count)
    runner = make(base.to(dtype))
    before = runner.weight.clone()
    for a, b in updates:
        runner.add(a, b)
    for a, b in reversed(updates):
        runner.take(a, b)
    return before.numel(), int((runner.weight != before).sum())


@numerics(
    "every bit of float16 weights as before; of bfloat16 ones at most 1 element in 10,000 is another", few=10, many=10
)
def merges_and_unmerges(count: int) -> Outcome:
    """So many merges and as many unmerges with int8 residuals. (A journal restores every bit of both.)"""
    entries, differ = _undone(lambda weight: Ours(weight, "int8"), torch.float16, count)
    _, rounded = _undone(lambda weight: Ours(weight, "int8"), torch.bfloat16, count)
    counts = {"entries": entries, "float16, differ": differ, "bfloat16, differ": rounded}
    return right(not differ and rounded <= 1e-4 * entries, f"{differ} and {rounded} of {entries} differ", **counts)


@merges_and_unmerges.peft
def _(count: int) -> Outcome:
    (entries, differ), (_, rounded) = (_undone(Theirs, dtype, count) for dtype in HALVES.values())
    counts = {"entries": entries, "float16, differ": differ, "bfloat16, differ": rounded}
    shares = f"{differ / entries:.1%} (float16) and {rounded / entries:.1%} (bfloat16) of the entries differ"
    return right(not differ and rounded <= 1e-4 * entries, shares, **counts)


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
