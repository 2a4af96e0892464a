"""What stands beside every figure: device, versions, commit; and the file of goals."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch


def facts() -> dict[str, str]:
    """Device, driver, threads, versions and commit."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
        "driver": _driver() if torch.cuda.is_available() else "none",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
    }


def save_goals(path: Path, goals: Iterable[tuple[str, float, float | None]]) -> None:
    """Name -> measured, target and where, into a JSON file; goals of other runs stay in it."""
    known, here = json.loads(path.read_text()) if path.exists() else {}, facts()
    known |= {name: {"measured": measured, "target": target, "facts": here} for name, measured, target in goals}
    path.write_text(json.dumps(known, indent=1) + "\n")


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split("\n")[0] or "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def package_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
