"""What a part is given: the device, its own record in the JSON, its share of the time, and what ran before."""

from __future__ import annotations

import time
from typing import Any

import torch

from gpu.state import State

# seconds that one item (a compilation, a rival's check, one interleaved comparison) may take before the worker is killed
ITEM_SECONDS = 90.0


class Lost(RuntimeError):
    """The device no longer answers this process; only a new one can go on."""


class Context:
    """Given to a part. `left()` is asked between items: what no longer fits is recorded as skipped for budget."""

    def __init__(self, state: State, name: str, device: torch.device, small: bool, deadline: float) -> None:
        self.state, self.name, self.device, self.small, self.deadline = state, name, device, small, deadline
        self.dtype = torch.bfloat16

    @property
    def data(self) -> dict[str, Any]:
        return self.state.part(self.name)["data"]

    def put(self, key: str, value: Any) -> Any:
        """Write one entry of this part's data, and the file."""
        self.data[key] = value
        self.state.save()
        return value

    def begin(self, item: str, allow: float = ITEM_SECONDS) -> None:
        """Say what comes next, so that whoever finds this process dead or stuck knows what it was at."""
        self.state.part(self.name).update(item=item, item_until=time.time() + allow)
        self.state.save()

    def left(self) -> float:
        """Seconds of this part's share."""
        return self.deadline - time.time()

    def other(self, part: str, *keys: str) -> Any:
        """A figure of another part, or None."""
        value: Any = self.state.data["parts"].get(part, {}).get("data", {})
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    @property
    def peak_flops(self) -> float | None:
        """Operations a second of the largest library product, as measured."""
        tflops = self.other("ceilings", "gemm_tflops")
        return None if tflops is None else tflops * 1e12

    @property
    def peak_bytes(self) -> float | None:
        """Bytes a second, read plus written, of the large copy, as measured."""
        gbs = self.other("ceilings", "copy_gbs")
        return None if gbs is None else gbs * 1e9

    def share_of_limit(self, flops: int, moved: int, time_us: float | None) -> float | None:
        """The device's limit for this much work, over the time that was measured."""
        if not (self.peak_flops and self.peak_bytes and time_us):
            return None
        return max(flops / self.peak_flops, moved / self.peak_bytes) * 1e6 / time_us

    def excluded(self, rival: str) -> str | None:
        """Why a rival is left out: it killed or failed an earlier part."""
        reason = self.state.data["excluded"].get(rival)
        # the op behind "float32 adapters" is that of the plain name
        return reason or self.state.data["excluded"].get(" ".join(rival.split()[:2]))

    def exclude(self, rival: str, reason: str) -> None:
        self.state.data["excluded"][rival] = reason
        self.state.save()

    def check_alive(self) -> None:
        """
        Raises:
            Lost: an earlier launch broke the context of this process.
        """
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self.device)
            torch.rand(1, device=self.device)  # raises where a failed capture left the generator behind
        except Exception as error:  # whatever the driver raises, this process is of no more use
            raise Lost(f"{type(error).__name__}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def told(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
