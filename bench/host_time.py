"""Host time of one call on a layer so small that nothing else counts, beside nn.Linear and the formula as written.

OMP_NUM_THREADS=1 python bench/host_time.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from fastlora import FusedRankLoRALinear

ROUNDS, CALLS = 7, 3000


def microseconds(call: Callable[[], object]) -> float:
    """Process time of a call: the least of the rounds' means."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(CALLS):
            call()
        best = min(best, (time.process_time() - start) / CALLS)
    return best * 1e6


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    linear = nn.Linear(16, 16).requires_grad_(False)
    layer = FusedRankLoRALinear(16, 16, rank=4)
    x, dy = torch.randn(4, 16, requires_grad=True), torch.randn(4, 16)
    adapter = (layer.lora_a, layer.lora_b, layer.gate)

    def formula(x: torch.Tensor) -> torch.Tensor:
        update = ((x @ layer.lora_a.t()) * layer.gate) @ layer.lora_b.t()
        return nn.functional.linear(x, layer.weight, layer.bias) + update

    def both(call: Callable[[torch.Tensor], torch.Tensor], leaves: tuple[torch.Tensor, ...]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call(x), leaves, dy)

    calls = {
        "nn.Linear": (linear, (x,)),
        "fastlora": (layer, (x, *adapter)),
        "formula as written": (formula, (x, *adapter)),
    }
    print(f"{'us a call':<20}{'forward':>10}{'/ Linear':>10}{'fwd + bwd':>12}{'/ Linear':>10}")
    base: tuple[float, float] | None = None
    for name, (call, leaves) in calls.items():
        times = microseconds(lambda: call(x)), microseconds(both(call, leaves))  # noqa: B023, called before the next turn
        base = base or times
        print(f"{name:<20}{times[0]:>10.1f}{times[0] / base[0]:>10.2f}{times[1]:>12.1f}{times[1] / base[1]:>10.2f}")


if __name__ == "__main__":
    main()
