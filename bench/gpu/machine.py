"""The machine and the installation: facts, build, correctness, ceilings."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import rivals
import torch
from rivals.case import Operands, make_operands, relative_error
from shapes import B16_SHAPES, Shape
from torch import Tensor

from fastlora import build_info, ops, reference
from gpu import timing
from gpu.context import Context, told
from gpu.install import ROOT, run_in_tree

KAPPA, SCALING = 0.3, 0.5
# ragged, one row, aligned, packed; on a device also a full-size layer, where every program of a persistent grid works
CHECKED = (
    Shape("ragged", 197, 72, 100, 3),
    Shape("one-row", 1, 48, 40, 1),
    Shape("aligned", 256, 128, 256, 16),
    Shape("packed", 197, 72, 120, 5, 3),
)
CHECKED_SMALL = (Shape("ragged", 19, 24, 20, 3), Shape("packed", 19, 24, 24, 2, 3))


def facts(run: Context) -> None:
    """Device, driver, versions, commit."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": os.environ.get("FASTLORA_COMMIT")
        or _output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "interpreter": os.environ.get("TRITON_INTERPRET") == "1",
    }
    for package in ("triton", "peft", "open_clip_torch", "numpy"):
        found[package] = _version(package)
    if run.device.type == "cuda":
        properties = torch.cuda.get_device_properties(run.device)
        query = "--query-gpu=driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw"
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "driver": (_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "").split("\n")[
                0
            ],
            "nvidia_smi": _output("nvidia-smi", query, "--format=csv"),
        }
    else:
        found |= {"device": f"CPU {_cpu_name()}", "driver": None, "threads": torch.get_num_threads()}
    for key, value in found.items():
        run.put(key, value)


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def build(run: Context) -> None:
    """What fastlora was built with; how it was installed is in the JSON's "install"."""
    for key, value in build_info().items():
        run.put(key, value)
    if run.device.type == "cuda" and not run.data["cuda"]:
        run.put("warning", f"the extension has no CUDA code ({run.data['cuda_reason']}): the merge runs in PyTorch")


def correctness(run: Context) -> None:
    """Every variant against float64, outputs and gradients; then the GPU tests of the test suite.

    A variant that fails here is measured nowhere: a time of a wrong result says nothing.
    """
    verdicts = run.put("variants", {})
    for name in rivals.OURS:
        verdicts[name] = _check_variant(run, name)
        run.state.save()
        if verdicts[name]["ok"] is False:
            run.exclude(name, f"failed the correctness part: {verdicts[name]['reason']}")
        run.check_alive()
    run.put("pytest", _pytest(run))
    wrong = [name for name, verdict in verdicts.items() if verdict["ok"] is False]
    if wrong or run.data["pytest"]["returncode"] not in (0, None):
        raise AssertionError(f"wrong: {wrong or 'no variant'}; pytest: {run.data['pytest']['summary']}")


def _check_variant(run: Context, name: str) -> dict[str, Any]:
    """ok: True, False, or None where it cannot run here."""
    variant = name.removeprefix("ours ")
    reason = run.excluded(name)
    if reason:
        return {"ok": False, "reason": reason}
    shapes = CHECKED_SMALL if run.small else (*CHECKED, *B16_SHAPES[1:3])
    dtypes = (run.dtype,) if run.small else (torch.bfloat16, torch.float16, torch.float32)
    worst: dict[str, float] = {}
    try:
        for shape in shapes:
            for dtype in dtypes if shape.m < 1000 else (run.dtype,):
                run.begin(name)
                operands = make_operands(shape, dtype, run.device)
                refusal = rivals.ours.why_not(operands, variant)
                if refusal:
                    return {"ok": None, "reason": refusal}
                share = _worst_share(operands, variant)
                worst[f"{shape} {str(dtype).removeprefix('torch.')}"] = round(share, 3)
                if not share <= 1:
                    return {"ok": False, "reason": f"error {share:.2f} times its limit at {shape}", "worst": worst}
    except Exception as error:  # a compiler, a driver, a kernel: whatever it is, the others go on
        return {"ok": False, "reason": told(error), "worst": worst}
    return {"ok": True, "worst_error_over_limit": max(worst.values()), "worst": worst}


def _worst_share(operands: Operands, variant: str) -> float:
    """Largest error over its limit, of y and all gradients; kappa and scaling on, some gates dead."""
    truth = _outputs(operands, torch.float64, None)
    plain = _outputs(operands, operands.dtype, None)
    ours = _outputs(operands, operands.dtype, variant)
    floor = torch.finfo(operands.dtype).eps / 8 + 4 * torch.finfo(torch.float32).eps
    shares = [relative_error(o, t) / (2 * relative_error(p, t) + floor) for o, p, t in zip(ours, plain, truth)]
    return max(shares, key=lambda share: float("inf") if share != share else share)


def _outputs(operands: Operands, dtype: torch.dtype, variant: str | None) -> list[Tensor]:
    """y, dx, and dlora_a, dlora_b, dgate of each part; by the definition where no variant is named."""
    x = operands.xs[0].detach().to(dtype).requires_grad_()
    # some gates are dead, but never all: a gradient of zeros has no relative error
    gates = [gate.clone().index_fill_(0, torch.tensor(0, device=gate.device), 0.9) for _, _, gate in operands.adapters]
    gates = [gate.double() if dtype == torch.float64 else gate for gate in gates]
    adapters = [
        [t.requires_grad_() for t in (a.detach().to(dtype, copy=True), b.detach().to(dtype, copy=True), gate)]
        for (a, b, _), gate in zip(operands.adapters, gates)
    ]
    weight, bias = operands.weight.to(dtype), operands.bias.to(dtype)
    if variant is None:
        y = torch.cat(
            [
                reference.rank_lora_linear(
                    x, weight[operands.rows(p)], bias[operands.rows(p)], *adapter, KAPPA, SCALING
                )
                for p, adapter in enumerate(adapters)
            ],
            1,
        )
    elif len(adapters) == 1:
        y = ops.rank_lora_linear(x, weight, bias, *adapters[0], KAPPA, SCALING, backend=variant)
    else:
        lists = [list(each) for each in zip(*adapters)]
        y = ops.rank_lora_packed(x, weight, bias, *lists, [KAPPA] * 3, SCALING, backend=variant)
    leaves = [x, *(t for adapter in adapters for t in adapter)]
    return [y.detach(), *torch.autograd.grad(y, leaves, operands.dys[0].to(dtype))]


def _pytest(run: Context) -> dict[str, Any]:
    """The tests that need a device, in a process of their own; a small run takes one file, to see that it starts."""
    # by its script: `python -m pytest` puts the root on the path, where triton_kernels hides Triton's own package
    scripts = Path(sysconfig.get_path("scripts")) / "pytest"
    program = str(scripts) if scripts.exists() else shutil.which("pytest")
    if program is None or importlib.util.find_spec("pytest") is None:
        return {"returncode": None, "summary": "pytest is not installed"}
    seconds = max(20.0, min(run.left() - 5, 100.0))
    run.begin("pytest", seconds + 20)
    files = ["tests/ops/test_rank_lora.py"] if run.small else ["tests/ops", "tests/triton_kernels", "tests/modules"]
    # tests/conftest.py turns the interpreter on where nothing is said
    environment = {**os.environ, "TRITON_INTERPRET": "0" if run.device.type == "cuda" else "1"}
    command = [program, "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    code, lines = run_in_tree(command, environment, seconds)
    result = {"returncode": code, "summary": lines[-1] if lines else "", "python": sys.executable}
    return result if code == 0 else {**result, "tail": lines[-40:]}


def ceilings(run: Context) -> None:
    """What the device can do: a large bf16 product of random data through the library, and a large copy."""
    side, count = (96, 1 << 16) if run.small else (8192, 1 << 30)
    generator = torch.Generator(run.device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator, device=run.device).to(run.dtype) for _ in range(2))
    run.begin("product")
    product = timing.interleaved({"product": lambda i: torch.mm(a, b)}, run.device, 1)["product"]
    run.put("gemm_side", side)
    run.put("gemm_us", product.summary())
    run.put("gemm_tflops", 2 * side**3 / product.median / 1e6)
    run.begin("copy")
    source = torch.randn(count, generator=generator, device=run.device)
    target = torch.empty_like(source)
    copy = timing.interleaved({"copy": lambda i: target.copy_(source)}, run.device, 1)["copy"]
    moved = 2 * source.numel() * source.element_size()
    run.put("copy_bytes", moved)
    run.put("copy_gbs", moved / copy.median / 1e3)
