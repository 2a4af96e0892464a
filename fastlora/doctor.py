"""What `fastlora doctor` prints: facts of this installation, none of which may stop it."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from pathlib import Path

import fastlora


def examine() -> list[tuple[str, str]]:
    """(subject, finding) lines."""
    lines = [
        ("fastlora", f"{fastlora.__version__} in {Path(fastlora.__file__).parent}"),
        ("python", f"{platform.python_version()} ({sys.executable}), {platform.platform()}"),
    ]
    lines += [(name, _version(package)) for name, package in (("triton", "triton"), ("open_clip", "open_clip_torch"))]
    return lines + _extension() + _torch()


def _extension() -> list[tuple[str, str]]:
    try:
        info = fastlora.build_info()
    except RuntimeError as error:
        return [("extension", f"unknown: {error}")]
    built = "built" if info["extension"] else "not built"
    lines = [("extension", f"{built}: {info['extension_reason']}")]
    lines.append(("  cuda", f"{'yes' if info['cuda'] else 'no'}: {info['cuda_reason']}"))
    skip = {"version", "extension", "extension_reason", "cuda", "cuda_reason"}
    return lines + [
        (f"  {key}", str(value)) for key, value in info.items() if key not in skip and value not in ("", None)
    ]


def _torch() -> list[tuple[str, str]]:
    try:
        import torch
    except ImportError as error:
        return [("torch", f"cannot be imported: {error}")]
    from fastlora.ops.backend import choose

    lines = [
        (
            "torch",
            f"{torch.__version__}, {torch.get_num_threads()} threads, built for CUDA {torch.version.cuda or 'none'}",
        )
    ]
    devices = [torch.device("cpu")]
    if not torch.cuda.is_available():
        lines.append(("gpu", "none: torch sees no CUDA or ROCm device"))
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        lines.append((f"gpu {index}", f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"))
        devices.append(torch.device("cuda", index))
    return lines + [("backend", f"{device}: {choose('auto', device, torch.float32, (16,))}") for device in devices]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
