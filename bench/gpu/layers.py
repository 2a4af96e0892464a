"""One layer: library times, the plain product, forward, forward + backward, LoRAFusion's grid, launch costs."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import rivals
import torch
from rivals.case import Absent, Case, Check, make_operands
from shapes import Shape, gpu_shapes, lorafusion_shapes

from fastlora.ops.backend import interpreting
from gpu import timing
from gpu.context import Context, told

# merged rounds the update into the weight at every step; it is shown and never taken for a goal
FORWARD = ("linear", *rivals.OURS, "as released")
LIKE_FOR_LIKE = tuple(name for name in rivals.OURS if name != "ours merged")
OTHERS = tuple(name for name in rivals.OTHERS if name != "compiled")
TRAINING = (*rivals.OURS, "ours auto float32 adapters", *OTHERS)
TORCH_COMPILE_SECONDS = 240.0


def library(run: Context) -> None:
    """F.linear for every shape, forward and with its backward."""
    for shape in _distinct([*gpu_shapes(run.small), *lorafusion_shapes(run.small)]):
        if _no_time(run, str(shape), 2):
            continue
        entry = {mode: compare(run, shape, ["linear"], mode, ["linear"], seconds=0.1) for mode in ("forward", "both")}
        run.put(str(shape), entry)


def forward(run: Context) -> None:
    """Every variant against F.linear (G1, G2, G3)."""
    for shape in gpu_shapes(run.small):
        if not _no_time(run, str(shape), 4):
            run.put(str(shape), compare(run, shape, FORWARD, "forward", ["linear"], seconds=0.4))


def backward(run: Context) -> None:
    """Forward + backward against all rivals but the compiler, which is slow (G4, G6)."""
    for shape in gpu_shapes(run.small):
        if not _no_time(run, str(shape), 6):
            run.put(str(shape), compare(run, shape, TRAINING, "both", OTHERS, seconds=0.5))


def compiled(run: Context) -> None:
    """Forward + backward against torch.compile with max-autotune, for the shapes of the goal (G5)."""
    for shape in (s for s in gpu_shapes(run.small) if s.name.startswith("b16")):
        if not _no_time(run, str(shape), 15):
            # the interpreter had its turn in part backward
            ours = ("ours auto", "ours torch") if run.small else LIKE_FOR_LIKE
            names = (*ours, "linear", "compiled")
            run.put(str(shape), compare(run, shape, names, "both", ("linear", "compiled"), seconds=0.5))


def lorafusion(run: Context) -> None:
    """LoRAFusion's grid (G7): ours over the library floor. LoRAFusion itself needs Triton 3.2 and cannot run here."""
    for shape in lorafusion_shapes(run.small):
        if not _no_time(run, str(shape), 4):
            names = (*LIKE_FOR_LIKE, "ours module dropout 0.1", "linear")
            run.put(str(shape), compare(run, shape, names, "both", ["linear"], seconds=0.3))


def compare(
    run: Context, shape: Shape, names: Sequence[str], mode: str, bases: Sequence[str], *, seconds: float
) -> dict[str, Any]:
    """Check, then time rivals side by side, "forward" or "both" (forward + backward), eager and as CUDA graphs.

    Returns:
        {"flops", "bytes", "rotations", "rivals": {name: {"eager_us", "graph_us", "share_of_limit", "to": {base: ...}} or
        {"reason"}}}.
    """
    element = run.dtype.itemsize
    rotated = shape.m * (shape.k + (shape.n if mode == "both" else 0)) * element
    rotations = timing.rotations_for(run.device, rotated)
    run.begin(f"operands of {shape}")
    operands = make_operands(shape, run.dtype, run.device, rotations=rotations)
    check = Check(operands, gradient=mode == "both")
    entries: dict[str, Any] = {}
    cases: dict[str, Case] = {}
    for name in names:
        found = _prepare(run, name, operands, check)
        if isinstance(found, str):
            entries[name] = {"reason": found}
        else:
            cases[name] = found
    calls = {name: getattr(case, mode) for name, case in cases.items()}
    eager = timing.interleaved(calls, run.device, rotations, seconds=seconds, begin=run.begin)
    graphs = timing.interleaved(calls, run.device, rotations, seconds=seconds, graph=True, begin=run.begin)
    flops = shape.flops(mode)
    for name, case in cases.items():
        best = graphs[name].median or eager[name].median
        base_only = name == "linear" and mode == "forward"
        work = (2 * shape.m * shape.k * shape.n, shape.bytes(mode, element, True)) if base_only else (
            flops, shape.bytes(mode, element)
        )  # fmt: skip
        entries[name] = {
            "eager_us": eager[name].summary(),
            "graph_us": graphs[name].summary(),
            "tflops": work[0] / best / 1e6 if best else None,
            "share_of_limit": run.share_of_limit(*work, best),
            "note": case.note,
            "to": {
                base: {"eager": eager[name].over(eager[base]), "graph": graphs[name].over(graphs[base])}
                for base in bases
                if base in cases
            },
        }
    result = {"shape": shape._asdict(), "mode": mode, "dtype": str(run.dtype).removeprefix("torch.")}
    return {**result, "flops": flops, "bytes": shape.bytes(mode, element), "rotations": rotations, "rivals": entries}


def _prepare(run: Context, name: str, operands: Any, check: Check) -> Case | str:
    """The rival, built and checked; or the reason that it is not measured."""
    reason = run.excluded(name)
    if reason:
        return reason
    # the name alone: whoever finds this process dead leaves out what it names
    run.begin(name, TORCH_COMPILE_SECONDS if name == "compiled" else 90.0)
    try:
        case = rivals.build(name, operands, small=run.small)
        if case.checked:
            check.worst(case)
        return case
    except Absent as error:
        return str(error)
    except Exception as error:  # a compiler, a driver, a kernel: whatever it is, the others go on
        run.check_alive()
        return told(error)


def plain(run: Context) -> None:
    """The plain-product mode of the Triton kernels, R = 0, against the library at every tile (G11)."""
    for shape in _distinct(gpu_shapes(run.small)):
        if not _no_time(run, str(shape), 4):
            run.put(str(shape), _plain_of(run, shape))


def _plain_of(run: Context, shape: Shape) -> dict[str, Any]:
    from fastlora import triton_kernels
    from fastlora.triton_kernels import common, tiles

    if run.device.type == "cpu" and not interpreting():
        return {"reason": "Triton's kernels need a CUDA or ROCm device"}
    rotations = timing.rotations_for(run.device, shape.m * shape.k * run.dtype.itemsize)
    operands = make_operands(shape, run.dtype, run.device, rotations=rotations)
    xs, weight, bias = [x.detach() for x in operands.xs], operands.weight, operands.bias
    empty = (weight.new_empty(0, shape.k), weight.new_empty(shape.n, 0), weight.new_empty(0, dtype=torch.float32))
    kappa = torch.zeros((), device=run.device)

    def product(tile: Any):
        return lambda i: triton_kernels.rank_lora_fwd(
            xs[i], weight, bias, *empty, kappa, 1.0, variant="split", tile=tile
        )[0]  # fmt: skip

    calls = {"linear": lambda i: torch.nn.functional.linear(xs[i], weight, bias)}
    truth = torch.nn.functional.linear(xs[0].double(), weight.double(), bias.double())
    limit = 2 * float((calls["linear"](0) - truth).norm()) + torch.finfo(run.dtype).eps / 8 * float(truth.norm())
    entries: dict[str, Any] = {}
    device = common.compute_type(xs[0]), common.architecture(xs[0])
    descriptors = {f"tma {name}": tile for name, tile in tiles.tile_configs("tma_gemm", *device).items()}
    configs = tiles.tile_configs("gemm", *device) | descriptors
    # "ragged" serves operands that are not aligned; these are, except for the interpreter, which has no other
    candidates = {"picked": None, **{name: tile for name, tile in configs.items() if name != "ragged" or run.small}}
    for name, tile in candidates.items():
        run.begin(f"plain product, tile {name}, {shape}")
        try:
            error = float((product(tile)(0) - truth).norm())
            if not error <= limit:
                raise AssertionError(f"its error is {error / limit:.2f} times the limit")
            calls[name] = product(tile)
        except Exception as error:  # a tile that this device refuses is a finding
            run.check_alive()
            entries[name] = {"reason": told(error)}
    run.begin(f"timing {shape}")
    eager = timing.interleaved(calls, run.device, rotations, seconds=0.3)
    graphs = timing.interleaved(calls, run.device, rotations, seconds=0.3, graph=True)
    for name in calls:
        # library over ours: speed relative to the library
        speed = {"eager": eager["linear"].over(eager[name]), "graph": graphs["linear"].over(graphs[name])}
        tile = asdict(configs[name]) if name in configs else None
        times = {"eager_us": eager[name].summary(), "graph_us": graphs[name].summary()}
        entries[name] = {**times, "tile": tile, "speed": speed}
    return {"shape": shape._asdict(), "tiles": entries}


def launch(run: Context) -> None:
    """Host time of one call, and what it launches; the device has next to nothing to do."""
    shape = Shape("tiny", 16, 64, 64, 16)
    operands = make_operands(shape, run.dtype, run.device)
    check = Check(operands)
    for name in (*rivals.OURS, "linear", "as released", "peft no-cast", "unsloth style"):
        if _no_time(run, name, 1):
            continue
        case = _prepare(run, name, operands, check)
        if isinstance(case, str):
            run.put(name, {"reason": case})
            continue
        entry: dict[str, Any] = {}
        for mode in ("forward", "both"):
            entry[f"{mode}_host_us"] = _host_us(run, getattr(case, mode))
            profile = timing.device_profile(getattr(case, mode), run.device)
            entry |= {f"{mode}_{key}": value for key, value in profile.items()}
        run.put(name, entry)


def _host_us(run: Context, call: Any) -> float:
    """Wall time of a call until it returns, not until the device is done."""
    rounds, calls = (2, 2) if run.small else (7, 100)
    best = math.inf
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) * 1e6 / calls)
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
    return best


def tune(run: Context) -> None:
    """fastlora's own tuning of the shapes here; what it writes serves "ours auto" in the parts that follow."""
    import fastlora.tune as tuning

    calls = [
        tuning.Call(s.m, s.n, s.k, s.r * s.parts, run.dtype, (s.r,) * 3 if s.parts == 3 else None)
        for s in gpu_shapes(run.small)
    ]
    if run.small:
        calls = calls[:1]
    table = run.state.path.with_name("dispatch.json")
    seconds = max(run.left(), 1.0)
    run.begin("tune", seconds + 120)
    report = tuning.tune(calls, run.device, out=table, budget_seconds=2 if run.small else seconds)
    run.put("table", str(table.name))
    run.put("report", str(report).splitlines())


def _no_time(run: Context, key: str, needed: float) -> bool:
    if run.small or run.left() > needed:
        return False
    run.put(key, {"reason": "skipped: budget"})
    return True


def _distinct(shapes: Sequence[Shape]) -> list[Shape]:
    """One of each M, K, N, without packing: what a plain product sees."""
    found = {(s.m, s.k, s.n): s._replace(parts=1) for s in reversed(shapes)}
    return list(reversed(found.values()))
