"""What `fastlora doctor` prints: the facts of this installation that a bug report needs, none of which may stop it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fastlora

PACKAGES = (
    *("triton", "numpy", "safetensors", "open_clip_torch", "torchvision", "jsonargparse", "peft", "transformers"),
    *("bitsandbytes", "torchao"),
)
# those that change which code runs, on what, or with how many threads; a name that ends in _ stands for all that begin so
VARIABLES = (
    *("FASTLORA_", "XDG_CACHE_HOME", "TRITON_", "PYTORCH_", "TORCH_", "TORCHDYNAMO_", "TORCHINDUCTOR_"),
    *("ATEN_CPU_CAPABILITY", "OMP_", "MKL_", "KMP_", "OPENBLAS_", "CUDA_", "CUBLAS_", "NVIDIA_TF32_OVERRIDE", "HIP_"),
    *("ROCR_", "HSA_", "LD_PRELOAD", "PYTHONPATH"),
)

Lines = list[tuple[str, str]]


def examine() -> Lines:
    """(subject, finding) lines."""
    sections: dict[str, Callable[[], str | Lines]] = {
        "fastlora": lambda: f"{fastlora.__version__} in {Path(fastlora.__file__).parent}",
        "python": lambda: f"{platform.python_version()} ({sys.executable})",
        "system": lambda: f"{_distribution()}, {platform.platform()}",
        "cpu": _cpu,
        "packages": lambda: ", ".join(f"{name.removesuffix('_torch')} {_version(name)}" for name in PACKAGES),
        "extension": _extension,
        "torch": _torch,
        "dispatch": _tables,
        "environment": lambda: " ".join(_environment()) or "none of the variables that change behaviour is set",
    }
    return [line for subject, section in sections.items() for line in _told(subject, section)]


def _told(subject: str, section: Callable[[], str | Lines]) -> Lines:
    try:
        found = section()
    except Exception as error:  # whatever is broken here is what the others are asked for
        found = f"cannot be told: {type(error).__name__}: {error}"
    return [(subject, found)] if isinstance(found, str) else found


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()


def _cpu() -> str:
    """Model, the cores that this process may use, and the machine's memory."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    model = names[0] if names else platform.processor() or platform.machine()
    return f"{model}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores, {memory / 2**30:.1f} GiB"


def _extension() -> Lines:
    info = fastlora.build_info()
    if not info["extension"]:
        return [("extension", f"not built: {info['extension_reason']}")]
    compiler = str(info.get("compiler", "unknown"))
    archs = f", for {info['cuda_archs']}" if info["cuda"] else ""
    return [
        # GCC's own name for its version is the number alone
        ("extension", f"{info['extension_reason']}, compiler {'GCC ' * compiler[:1].isdigit()}{compiler}"),
        ("  built on", f"Python {info.get('python')}, {info.get('platform')}"),
        ("  simd", f"{info['simd'][-1]} runs, of {', '.join(info['simd'])}"),
        ("  cuda", f"{'yes' if info['cuda'] else 'no'}: {info['cuda_reason']}{archs}"),
    ]


def _torch() -> Lines:
    import torch

    from fastlora.ops.backend import choose

    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    gpus = [(f"gpu {device.index}", _gpu(torch, device)) for device in devices[1:]]
    return [
        ("torch", _torch_build(torch)),
        *(gpus or [("gpu", f"none: torch sees no CUDA or ROCm device; {_driver()}")]),
        *(("backend", f"{device}: {choose('auto', device, torch.float32, (16,))}") for device in devices),
    ]


def _torch_build(torch: Any) -> str:
    built = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda or 'none'}"
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return (
        f"{torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, "
        f"{'with' if torch.backends.mkl.is_available() else 'without'} MKL, built for {built}"
        + (f", cuDNN {cudnn}" if cudnn else "")
    )


def _gpu(torch: Any, device: Any) -> str:
    facts = torch.cuda.get_device_properties(device)
    return (
        f"{facts.name}, compute capability {facts.major}.{facts.minor}, {facts.multi_processor_count} multiprocessors, "
        f"{facts.total_memory / 2**30:.1f} GiB, {_driver()}"
    )


def _driver() -> str:
    """The kernel module's own version, which needs neither nvidia-smi nor a device that works."""
    for module in ("nvidia", "amdgpu"):
        for line in _lines(f"/sys/module/{module}/version"):
            return f"{module} driver {line.strip()}"
    return "no version of a driver in /sys/module"


def _tables() -> str:
    """Entries of the two dispatch tables, of which the user's comes first."""
    from fastlora.ops.dispatch import SHIPPED, user_table_path
    from fastlora.ops.dispatch_table import read_table

    found = []
    for whose, path in (("yours", user_table_path()), ("shipped", SHIPPED)):
        try:
            table = read_table(path, whose)
        except FileNotFoundError:
            found.append(f"{whose}: none at {path}")
        except (OSError, ValueError) as error:
            found.append(f"{whose}: {path} cannot be used: {error}")
        else:
            measured = sum("not measured" not in entry.measured for entry in table.values())
            devices = ", ".join(sorted({key.device for key in table})) or "no device"
            found.append(f"{whose}: {len(table)} entries for {devices}, {measured} measured")
    return "; ".join(found)


def _environment() -> Iterator[str]:
    for name, value in sorted(os.environ.items()):
        if any(name == known or (known.endswith("_") and name.startswith(known)) for known in VARIABLES):
            yield f"{name}={value!r}"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return []


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
