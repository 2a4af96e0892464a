"""What acts on all adapters of a model at once: the merge (G8) and the optimizer with its proximal step (G9)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from rivals.optimizers import OPTIMIZERS, UNCAPTURABLE, fused_and_foreach, ours
from shapes import module_shapes
from torch import Tensor

from fastlora import ops, reference
from gpu import timing
from gpu.context import Context, told

Adapters = list[tuple[Tensor, Tensor, Tensor]]


def modules(small: bool) -> list[tuple[int, int]]:
    """[N, K] of every adapted matrix; of a tiny model for a small run."""
    return module_shapes(1, (16, 8)) if small else module_shapes()


def _adapters(run: Any, dtype: torch.dtype, scale: float) -> tuple[list[Tensor], Adapters]:
    generator = torch.Generator(run.device).manual_seed(0)

    def normal(*size: int, factor: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator, device=run.device).mul_(factor)

    r = 4 if run.small else 16
    weights, adapters = [], []
    for n, k in modules(run.small):
        weights.append(normal(n, k, factor=k**-0.5).to(dtype))
        # no gate near zero: every rank is at work in every rival
        adapters.append((normal(r, k, factor=k**-0.5), normal(n, r, factor=scale), normal(r).sign() + 0.1 * normal(r)))
    return weights, adapters


def merge(run: Context) -> None:
    """merge_ as users call it, without its first look, and at random, against a loop of addmm_, for both half types."""
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        if run.small or run.left() > 3:
            run.put(name, _merge_in(run, dtype))
        else:
            run.put(name, {"reason": "skipped: budget"})


def _merge_in(run: Context, dtype: torch.dtype) -> dict[str, Any]:
    # a thousand merges of so small an update leave every weight finite
    weights, adapters = _adapters(run, dtype, 1e-5)
    lora_as, lora_bs, gates = (list(each) for each in zip(*adapters))
    half = [(b.to(dtype), a.to(dtype), g.to(dtype)) for a, b, g in adapters]

    def addmm_loop() -> None:
        for weight, (b, a, g) in zip(weights, half):
            weight.addmm_(b * g, a)

    runs: dict[str, Callable[[], Any]] = {
        "merge_": lambda: ops.merge_(weights, lora_as, lora_bs, gates),
        "merge_ check=False": lambda: ops.merge_(weights, lora_as, lora_bs, gates, check=False),
        "merge_ stochastic": lambda: ops.merge_(
            weights, lora_as, lora_bs, gates, check=False, rounding="stochastic", seed=1
        ),
        "addmm_ loop": addmm_loop,
    }
    run.begin(f"check of merge_, {dtype}")
    report = _check_merge(weights, adapters)
    run.begin(f"timing merge_, {dtype}")
    timed = {name: _ignoring(call) for name, call in runs.items()}
    series = timing.interleaved(timed, run.device, 1, seconds=1.0)
    graphs = timing.interleaved(timed, run.device, 1, seconds=1.0, graph=True, uncapturable={"merge_": _NO_GRAPH})
    moved = 2 * sum(w.numel() * w.element_size() for w in weights) + sum(
        t.numel() * t.element_size() for adapter in adapters for t in adapter
    )
    result: dict[str, Any] = {"modules": len(weights), "bytes": moved, "backend": report}
    for name, call in runs.items():
        run.begin(f"profile of {name}")
        profile = _profile(run, call)
        kernel_us = profile.get("kernel_us")
        share = moved / (kernel_us * 1e-6) / run.peak_bytes if kernel_us and run.peak_bytes else None
        result[name] = {
            "eager_us": series[name].summary(),
            "graph_us": graphs[name].summary(),
            "to addmm_ loop": series[name].over(series["addmm_ loop"]),
            "to addmm_ loop, graph": graphs[name].over(graphs["addmm_ loop"]),
            "to check=False": series[name].over(series["merge_ check=False"]),
            "profile": profile,
            "share_of_copy": share,
        }
    return result


_NO_GRAPH = "check=True decides on the host whether to write"


def _check_merge(weights: Sequence[Tensor], adapters: Adapters) -> str:
    """Every weight as the definition says, to one rounding; returns which backend merged."""
    merged = [weight.clone() for weight in weights[:6]]
    lora_as, lora_bs, gates = (list(each)[:6] for each in zip(*adapters))
    # visible after rounding, unlike the update that is timed
    lora_bs = [b * 1e4 for b in lora_bs]
    report = ops.merge_(merged, lora_as, lora_bs, gates)
    for got, weight, *adapter in zip(merged, weights, lora_as, lora_bs, gates):
        expected = reference.merge(weight, *adapter)
        torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(got.dtype).eps, atol=1e-4)
    return report.backend


def _profile(run: Context, call: Callable[[], Any], calls: int = 5) -> dict[str, Any]:
    try:
        return timing.device_profile(call, run.device, calls)
    except Exception as error:  # profilers fail for reasons of their own; the times above stand without it
        run.check_alive()
        return {"kernel_us": None, "launches": None, "reason": told(error)}


def _ignoring(call: Callable[[], Any]) -> timing.Call:
    return lambda i: call()


def optimizer(run: Context) -> None:
    """One step over 432 tensors with the proximal step on 144 gates, against two compositions of torch's own.

    Ours is one launch where `why_not` is empty, captured or not: steps, lr and kappa lie on the device in any case.
    """
    run.begin("check of the optimizers")
    check_optimizers(run)
    eager = {name: make_step(run, make, False) for name, make in OPTIMIZERS.items()}
    run.begin("timing the optimizers")
    series = timing.interleaved({n: _ignoring(step) for n, step in eager.items()}, run.device, 1, seconds=1.0)
    captured: dict[str, timing.Call] = {}
    for name, make in OPTIMIZERS.items():
        captured[name] = _ignoring(make_step(run, make, True))
    run.begin("capturing the optimizers")
    graphs = timing.interleaved(captured, run.device, 1, seconds=1.0, graph=True, uncapturable=UNCAPTURABLE)
    for name, step in eager.items():
        to = {
            base: {"eager": series[name].over(series[base]), "graph": graphs[name].over(graphs[base])}
            for base in OPTIMIZERS
        }
        times = {"eager_us": series[name].summary(), "graph_us": graphs[name].summary()}
        run.put(name, {**times, "profile": _profile(run, step), "to": to})
    run.put("one launch", one_launch(eager["ProxAdamW"]))


def one_launch(step: Callable[[], None]) -> dict[str, Any]:
    """Whether the last ProxAdamW step was one launch, and if not, why."""
    why_not = step.__self__.why_not  # type: ignore[attr-defined]
    return {"taken": not why_not, "reason": why_not}


def make_step(run: Any, make: Callable[..., Callable[[], None]], capturable: bool) -> Callable[[], None]:
    _, adapters = _adapters(run, torch.float32, 0.1)
    parameters = [[torch.nn.Parameter(t) for t in adapter] for adapter in adapters]
    generator = torch.Generator(run.device).manual_seed(1)
    for adapter in parameters:
        for parameter in adapter:
            parameter.grad = torch.randn(parameter.shape, generator=generator, device=run.device)
    directions = [p for a, b, _ in parameters for p in (a, b)]
    return make(directions, [gate for _, _, gate in parameters], capturable and run.device.type == "cuda")


def check_optimizers(run: Any) -> None:
    """Three steps of ours leave what three steps of torch's AdamW and the exact operator leave."""
    found = []
    for make in (ours, fused_and_foreach):
        kept: list[Tensor] = []

        def keeping(directions: list[Tensor], gates: list[Tensor], capturable: bool, make=make, kept=kept):
            kept += directions + gates
            return make(directions, gates, capturable)

        step = make_step(run, keeping, False)
        for _ in range(3):
            step()
        found.append([t.detach().clone() for t in kept])
    for mine, theirs in zip(*found):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
