"""The process that measures: parts one after the other, each recorded whatever happens to it."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch

from gpu.context import Context, Lost, told
from gpu.state import State

# this process can no longer use the device; a new one may
LOST_DEVICE = 77


def work(
    state: State,
    names: list[str],
    load: Callable[[str], Callable[[Context], None]],
    shares: Mapping[str, float],
    deadline: float,
    device: torch.device,
) -> int:
    """Run the parts that are not done. deadline: epoch seconds; what would start behind it is skipped.

    Returns:
        0, or LOST_DEVICE: the part that runs then is left as "running", with its item and error.
    """
    if device.type == "cpu":
        torch.set_num_threads(1)
    for name in names:
        part = state.part(name)
        if part["status"] in ("done", "failed", "skipped"):
            continue
        if deadline - time.time() < 3:
            state.finish(name, "skipped", reason="skipped: budget")
            continue
        share = min(deadline, time.time() + shares[name])
        context = Context(state, name, device, state.data["small"], share)
        start = time.time()
        part["status"] = "running"
        context.begin("its start")
        print(f"-- {name}", flush=True)
        try:
            load(name)(context)
            context.check_alive()
        except Exception as error:  # a part that fails must not lose the others
            text = told(error)
            if isinstance(error, Lost) or not _alive(context):
                part["error"] = text
                state.save()
                return LOST_DEVICE
            where = traceback.format_exc().splitlines()[-8:]
            state.finish(name, "failed", error=text, traceback=where, seconds=time.time() - start)
            print(f"   failed: {text}", flush=True)
        else:
            state.finish(name, "done", seconds=time.time() - start)
        _clean(device)
    return 0


def _alive(context: Context) -> bool:
    try:
        context.check_alive()
    except Lost:
        return False
    return True


def _clean(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def unfinished(state: State, names: list[str]) -> list[str]:
    """Parts that a new process would still have to run."""
    done: Any = ("done", "failed", "skipped")
    return [name for name in names if state.part(name)["status"] not in done]
