"""What repeated merges lose, what undoing them restores, and what a merge of 7 billion parameters allocates.

    python bench/merge_figures.py --out bench/results/merge.json --docs docs/merge.md
    python bench/merge_figures.py --small            # seconds, to see that it runs

Errors are taken in float64 against the sum of all updates. Weights are N(0, 1 / K) in the shapes of one block of each
tower of CLIP ViT-B/16; the norm of an update is told for all 144 matrices, as if each block had its share.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from merge_model import MergeSet, make_set
from shapes import module_shapes
from torch import Tensor, nn

from fastlora import build_info, ops, reference
from fastlora.build import extension

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
NORMS = (3.0, 1.0, 0.3)  # ||delta W||_F of one task over all 144 matrices
TASKS = (10, 50)
RANK = 8
LLAMA_7B = ([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]) * 32
MARK = "<!-- figures -->"
Merge = Callable[[list[Tensor], MergeSet, int], None]


class Peft:
    """PEFT's own merge and unmerge into nn.Linear layers that share our weights; adapters in float32, its default."""

    def __init__(self, weights: list[Tensor]) -> None:
        import peft

        self.layers = []
        for weight in weights:
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
            config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
            layer = peft.get_peft_model(nn.Sequential(linear), config).base_model.model[0]
            layer.base_layer.weight.data = weight
            self.layers.append(layer)

    def run(self, given: MergeSet, undo: bool = False) -> None:
        for layer, lora_a, lora_b in zip(self.layers, given.lora_as, given.lora_bs):
            layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = lora_a, lora_b
            layer.merged_adapters = ["default"] if undo else []
            layer.unmerge() if undo else layer.merge()


class Ours:
    """merge_ and unmerge_ with one way of rounding."""

    def __init__(self, weights: list[Tensor], rounding: str, residuals: list[Tensor] | None) -> None:
        self.weights, self.rounding, self.residuals, self.seed = weights, rounding, residuals, 0

    def run(self, given: MergeSet, undo: bool = False) -> None:
        adapters = given.lists[1:]
        if undo:
            ops.unmerge_(self.weights, *adapters, residuals=self.residuals)
        elif self.rounding == "stochastic":
            self.seed += 1
            ops.merge_(self.weights, *adapters, rounding="stochastic", seed=self.seed)
        else:
            ops.merge_(self.weights, *adapters, residuals=self.residuals)


def ways(weights: list[Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "nearest": Ours(weights, "nearest", None),
        "stochastic": Ours(weights, "stochastic", None),
        "residual, weight's dtype": Ours(weights, "nearest", ops.new_residuals(weights)),
        "residual, int8": Ours(weights, "nearest", ops.new_residuals(weights, int8=True)),
    }
    try:
        found[f"PEFT {importlib.metadata.version('peft')}"] = Peft(weights)
    except ImportError:
        pass
    return found


def held_by(way: Any, weights: list[Tensor]) -> list[Tensor]:
    """Weight and residual together, float64."""
    kept = getattr(way, "residuals", None)
    if kept is None:
        return [weight.double() for weight in weights]
    return [weight.double() + residual_value(residual, weight) for weight, residual in zip(weights, kept)]


def residual_value(residual: Tensor, weight: Tensor) -> Tensor:
    if residual.dtype != torch.int8:
        return residual.double()
    spacing = torch.finfo(weight.dtype).eps * 2.0 ** weight.double().abs().log2().floor()
    smallest = torch.finfo(weight.dtype).smallest_normal * torch.finfo(weight.dtype).eps
    return residual.double() * spacing.clamp_min(smallest) / 254


def tasks_of(shapes: list[tuple[int, int]], norm: float) -> Iterator[MergeSet]:
    """Endless updates whose elements have the size that `norm` over all matrices means."""
    size = norm / sum(n * k for n, k in module_shapes()) ** 0.5
    task = 0
    while True:
        task += 1
        yield make_set(shapes, RANK, torch.float32, size, seed=task)


def repeated(dtype: torch.dtype, norm: float, tasks: tuple[int, ...], shapes: list[tuple[int, int]]) -> dict[str, Any]:
    """Relative error of the accumulated update after so many merges, by way of rounding."""
    base = make_set(shapes, RANK, dtype, 0.0).weights
    names = list(ways([weight.clone() for weight in base[:1]]))
    weights = {name: [weight.clone() for weight in base] for name in names}
    runners = {name: ways(weights[name])[name] for name in names}
    update = [torch.zeros(weight.shape, dtype=torch.float64) for weight in base]
    result: dict[str, Any] = {}
    for count, given in zip(range(1, max(tasks) + 1), tasks_of(shapes, norm)):
        for total, *adapter in zip(update, *given.lists[1:]):
            total += reference.delta_weight(*(each.double() for each in adapter))
        for runner in runners.values():
            runner.run(given)
        if count in tasks:
            result[str(count)] = _errors(base, update, weights, runners, dtype)
    return result


def _errors(base, update, weights, runners, dtype) -> dict[str, float]:
    norm = sum(float(each.square().sum()) for each in update) ** 0.5

    def error(held: list[Tensor]) -> float:
        squares = (float((h - b.double() - u).square().sum()) for h, b, u in zip(held, base, update))
        return sum(squares) ** 0.5 / norm

    cast_once = [(b.double() + u).to(dtype).double() for b, u in zip(base, update)]
    errors = {"the exact sum, cast once": error(cast_once)}
    for name, runner in runners.items():
        errors[name] = error([weight.double() for weight in weights[name]])
        if getattr(runner, "residuals", None) is not None:
            errors[f"{name}: weight + residual"] = error(held_by(runner, weights[name]))
    return errors


def undone(dtype: torch.dtype, norm: float, count: int, shapes: list[tuple[int, int]]) -> dict[str, Any]:
    """Share of elements that differ after `count` merges and their undoing, last one first."""
    base = make_set(shapes, RANK, dtype, 0.0).weights
    given = [each for _, each in zip(range(count), tasks_of(shapes, norm))]
    result = {}
    for name in ways([weight.clone() for weight in base[:1]]):
        if name == "stochastic":
            continue
        weights = [weight.clone() for weight in base]
        runner = ways(weights)[name]
        for each in given:
            runner.run(each)
        for each in reversed(given):
            runner.run(each, undo=True)
        differ = sum(int((weight != old).sum()) for weight, old in zip(weights, base))
        result[name] = differ / sum(weight.numel() for weight in weights)
    return result


def memory(shapes: list[tuple[int, int]], dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Bytes that one checked merge adds to the process's peak, and what the CUDA path asks of a device."""
    weights = [torch.zeros(n, k, dtype=dtype) for n, k in shapes]
    lora_as = [torch.full((16, k), 1e-3) for _, k in shapes]
    lora_bs = [torch.full((n, 16), 1e-3) for n, _ in shapes]
    gates = [torch.ones(16) for _ in shapes]
    for weight in weights:
        weight.fill_(0.01)  # the pages are there before the peak is read
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ops.merge_(weights, lora_as, lora_bs, gates)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result: dict[str, Any] = {"modules": len(shapes), "parameters": sum(n * k for n, k in shapes)}
    result["cpu_extra_bytes"] = (after - before) * 1024
    if build_info()["cuda"]:
        result["cuda_workspace_bytes"] = _workspace(weights, lora_as, lora_bs, gates)
    return result


def _workspace(weights, lora_as, lora_bs, gates) -> int:
    from fastlora.ops.merge_checks import check_merge
    from fastlora.ops.merge_native import NativeMerge

    native = NativeMerge(check_merge(weights, lora_as, lora_bs, gates, 1.0, None), None)
    return extension().cuda_workspace(native._items)[1]


def facts() -> dict[str, Any]:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"device": f"CPU {cpu}", "torch": torch.__version__, "commit": commit.stdout.strip() or "unknown"}


def measure(small: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    shapes = module_shapes(1, (16,)) if small else module_shapes(1)
    tasks, norms = ((2,), NORMS[:1]) if small else (TASKS, NORMS)
    found: dict[str, Any] = {"facts": facts(), "rank": RANK, "repeated": {}, "undone": {}}
    found["memory"] = memory(shapes if small else LLAMA_7B)
    for name, dtype in DTYPES.items():
        for norm in norms:
            found["repeated"][f"{name} {norm:g}"] = repeated(dtype, norm, tasks, shapes)
            found["undone"][f"{name} {norm:g}"] = undone(dtype, norm, tasks[0], shapes)
    return found


def tables(found: dict[str, Any]) -> str:
    """Markdown of the figures."""
    lines = []
    counts = list(next(iter(found["repeated"].values())))
    for count in counts:
        rows = {key: by_count[count] for key, by_count in found["repeated"].items()}
        lines += [f"Relative error of the accumulated update after {count} merges of rank {found['rank']}:", ""]
        lines += _table(rows, "{:.3%}")
    lines += [f"Share of the elements that differ after {counts[0]} merges and {counts[0]} unmerges:", ""]
    lines += _table(found["undone"], "{:.4%}")
    memory = found["memory"]
    device = memory.get("cuda_workspace_bytes")
    lines += [
        f"A checked merge of {memory['modules']} matrices with {memory['parameters'] / 1e9:.2f} billion bfloat16 "
        f"parameters adds {memory['cpu_extra_bytes'] / 2**20:.0f} MiB to the peak of the process"
        + (f", and asks {device / 2**20:.0f} MiB of a CUDA device." if device else "."),
        "",
        "Measured on {device}, torch {torch}, commit {commit}.".format(**found["facts"]),
    ]
    return "\n".join(lines)


def _table(columns: dict[str, dict[str, float]], form: str) -> list[str]:
    names = list(next(iter(columns.values())))
    heads = [f"{key.split()[0]}, ‖ΔW‖ {key.split()[1]}" for key in columns]
    lines = ["| | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
    lines += [f"| {name} | " + " | ".join(form.format(columns[key][name]) for key in columns) + " |" for name in names]
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--docs", type=Path, help=f"page whose text behind {MARK} is replaced")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to see that it runs")
    options = parser.parse_args()
    found = measure(options.small)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    if options.docs:
        head = options.docs.read_text().split(MARK)[0]
        options.docs.write_text(f"{head}{MARK}\n\n{tables(found)}\n")
    print(tables(found))


if __name__ == "__main__":
    main()
