"""Makes `import fastlora` work on a machine that has the source tree and no network."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# the kernels are found, not imported: an error in them is no reason to build again
_PROBE = """
import importlib.util, sys, fastlora
info = fastlora.build_info()
lacks = [] if importlib.util.find_spec("fastlora.triton_kernels") else ["fastlora.triton_kernels"]
lacks += [] if info["extension"] else [info["extension_reason"]]
lacks += [] if info["cuda"] or sys.argv[1] == "False" else [info["cuda_reason"]]
sys.exit("; ".join(lacks) or 0)
"""


def ensure_installed(mode: str, cuda: bool, seconds: float) -> dict[str, Any]:
    """Build and install the tree in place, without network, where that is needed.

    Args:
        mode: "auto": only if fastlora cannot be imported, or lacks what is wanted; "always"; "never".
        cuda: the extension is wanted with its CUDA code.
    Returns:
        {"done", "seconds", "reason" or "tail"} for the JSON. A build that fails is a finding: what can run without runs.
    """
    probe = subprocess.run(
        [sys.executable, "-c", _PROBE, str(cuda)], capture_output=True, text=True, cwd="/", timeout=120
    )
    if mode == "never" or (mode == "auto" and probe.returncode == 0):
        lines = probe.stderr.strip().splitlines()
        return {"done": False, "reason": "not needed" if probe.returncode == 0 else lines[-1]}
    start = time.time()
    environment = {**os.environ, **_this_device_only()}
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--quiet", "-e", str(ROOT)]
    code, lines = run_in_tree(command, environment, seconds)
    return {"done": code == 0, "returncode": code, "seconds": time.time() - start, "tail": lines[-25:]}


def run_in_tree(command: list[str], environment: dict[str, str], seconds: float) -> tuple[int, list[str]]:
    """Return code and lines of a command that is run in the tree's root; -1 where it was stopped after `seconds`."""
    options = {"capture_output": True, "text": True, "cwd": ROOT, "stdin": subprocess.DEVNULL}
    try:
        done = subprocess.run(command, env=environment, timeout=seconds, **options)
    except subprocess.TimeoutExpired:
        return -1, [f"stopped after {seconds:.0f} s"]
    return done.returncode, (done.stdout + done.stderr).strip().splitlines()


def _this_device_only() -> dict[str, str]:
    """The architecture of the device at hand: code for the others would take minutes of nvcc that nobody needs here."""
    if "FASTLORA_CUDA_ARCHS" in os.environ:
        return {}
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"FASTLORA_CUDA_ARCHS": f"{found[0].replace('.', '')}-real"} if found else {}


def use_source_tree() -> None:
    """For a process in which fastlora is not installed: its packages from the tree, the extension left out."""
    import importlib.util

    if importlib.util.find_spec("fastlora") is None:
        sys.path.append(str(ROOT))
    import fastlora

    if importlib.util.find_spec("fastlora.triton_kernels") is not None:
        return
    folder = Path(fastlora.__file__).parents[1] / "triton_kernels"
    # not sys.path: the bare name would hide the package of that name that ships with Triton
    spec = importlib.util.spec_from_file_location(
        "fastlora.triton_kernels", folder / "__init__.py", submodule_search_locations=[os.fspath(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["fastlora.triton_kernels"] = module
    spec.loader.exec_module(module)
