"""What a call costs: operations of torch and bytes kept for backward, which are counted, and process time."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Call = Callable[[], Any]


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        return func(*args, **(kwargs or {}))


def operations(call: Call) -> int:
    """Operations of torch that `call` dispatches."""
    with _Counter() as counter:
        call()
    return counter.operations


def kept_bytes(call: Call, besides: Iterable[Tensor] | None = None) -> int:
    """What autograd keeps of a call, each storage once.

    Args:
        besides: tensors that do not count; by default all that were there before the call, as parameters are.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in besides} if besides else set(_addresses())
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(kept.values())


def _addresses() -> Iterator[int]:
    """Of the memory of every tensor that there is; sparse and transformed ones have none of their own."""
    for each in gc.get_objects():
        if type(each) in (Tensor, torch.nn.Parameter):
            with contextlib.suppress(NotImplementedError, RuntimeError):
                yield each.untyped_storage().data_ptr()


def fastest(
    calls: Mapping[str, Call], seconds: float, rounds: int = 3, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Time of the fastest call of each, in turn until `seconds` have passed, `rounds` times at least.

    Process time is what others on the machine disturb least; that of several threads adds theirs up.
    """
    best, done, start = dict.fromkeys(calls, float("inf")), 0, time.perf_counter()
    while done < rounds or time.perf_counter() - start < seconds:
        for name, call in calls.items():
            before = clock()
            call()
            best[name] = min(best[name], clock() - before)
        done += 1
    return best
