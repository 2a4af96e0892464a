"""One training step of CLIP ViT-B/16, 64 images and 100 classes (G10): ours, as the released code computes it, and PEFT.

The model is open_clip's where that is installed, else a stand-in of torch layers of the same sizes and names; weights
are random. rivals/steps.py holds the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from rivals import steps as of
from rivals.clip import make_model
from torch import Tensor

from gpu import timing
from gpu.context import Context, told
from gpu.whole import _profile


def step(run: Context) -> None:
    """Ours under bf16 autocast and over a bf16 base; the released code and PEFT under bf16 autocast and in float32."""
    run.begin("the model")
    model, sizes, which = make_model(run.small)
    model.requires_grad_(False)
    run.put("model", which)
    run.put("sizes", sizes._asdict())
    batch = of.make_batch(run, sizes)
    makers: dict[str, Callable[[], of.Step]] = {
        "ours bf16 autocast": lambda: of.ours(run, model, sizes, batch, autocast=True),
        "ours bf16 base": lambda: of.ours(run, model, sizes, batch),
        "released bf16 autocast": lambda: of.released(run, model, sizes, batch, autocast=True),
        "released float32": lambda: of.released(run, model, sizes, batch),
        "peft bf16 autocast": lambda: of.peft(run, model, sizes, batch, autocast=True),
        "peft, short texts, bf16 autocast": lambda: of.peft_short(run, model, sizes, batch, autocast=True),
    }
    steps: dict[str, Callable[[], Tensor]] = {}
    for name, make in makers.items():
        if run.excluded(name):
            run.put(name, {"reason": run.excluded(name)})
            continue
        run.begin(name)
        try:
            steps[name] = make()
            losses = [float(steps[name]()) for _ in range(3)]
            if not all(math.isfinite(loss) for loss in losses):
                raise AssertionError(f"its losses are {losses}")
            run.put(name, {"losses": losses, "reason": "not timed yet"})
        except Exception as error:  # one that cannot run must not lose the others
            run.check_alive()
            steps.pop(name, None)
            run.put(name, {"reason": told(error)})
    run.begin("timing steps", 180)
    calls = {name: _ignoring(each) for name, each in steps.items()}
    eager = timing.interleaved(calls, run.device, 1, seconds=6.0)
    run.begin("capturing steps", 150)
    masks = {name: "its boolean masks wait for the device" for name in calls if name.startswith("released")}
    graphs = timing.interleaved(calls, run.device, 1, seconds=3.0, graph=True, uncapturable=masks)
    for name, each in steps.items():
        # a rival that waits for the device in its step cannot be captured: then its eager time is the base of both
        to = {
            base: {
                "eager": eager[name].over(eager[base]),
                "graph": graphs[name].over(graphs[base] if graphs[base].samples else eager[base]),
                "graph_base": "graph" if graphs[base].samples else f"eager: {graphs[base].reason}",
            }
            for base in steps
        }
        times = {"eager_us": eager[name].summary(), "graph_us": graphs[name].summary()}
        run.put(name, {"losses": run.data[name]["losses"], **times, "to": to, "profile": _profile(run, each, 1)})


def _ignoring(call: Callable[[], Any]) -> timing.Call:
    return lambda i: call()
