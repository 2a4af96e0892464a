"""What the installation was built with: the record of the build, and the compiled module's own word."""

from __future__ import annotations

import functools
import importlib
import json
import platform
from pathlib import Path
from types import ModuleType
from typing import Any

from fastlora import __version__

_RECORD = Path(__file__).with_name("_build_info.json")


@functools.lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, str]:
    """The extension, or None and the reason why it cannot be had."""
    try:
        return importlib.import_module("fastlora._C"), ""
    except ImportError as error:
        if not isinstance(error, ModuleNotFoundError) or error.name != "fastlora._C":
            return None, f"fastlora._C cannot be loaded: {error}"
        record = _read_record()
        if record.get("extension"):
            here = platform.python_version()
            return None, f"it was built for Python {record['python']}, and this is {here}; install fastlora again here"
        return None, record["extension_reason"]


def _read_record() -> dict[str, Any]:
    """What the build wrote about itself.

    Raises:
        RuntimeError: the record exists and cannot be read.
    """
    unknown = {"extension_reason": "no build has been run: this is a source tree, not an installation (pip install .)"}
    try:
        return {**unknown, **json.loads(_RECORD.read_text())}
    except FileNotFoundError:
        return unknown
    except (OSError, ValueError) as error:
        raise RuntimeError(f"{_RECORD} cannot be read: {error}. Install fastlora again.") from error


def extension() -> ModuleType | None:
    """The compiled module `fastlora._C`, or None where the installation has none; `build_info()` says why."""
    return _load()[0]


def build_info() -> dict[str, Any]:
    """What fastlora was built with, and why.

    Returns:
        version; extension (bool) and extension_reason; cuda (bool), cuda_reason and cuda_archs. With the extension also
        compiler, simd (what this processor runs of it, slowest first), and with CUDA cuda_version. Further keys tell of
        the machine that built it.
    Raises:
        RuntimeError: the record of the build is unreadable.
    """
    module, reason = _load()
    info = {"cuda": False, "cuda_reason": "the extension was not built", "cuda_archs": "", **_read_record()}
    info["version"], info["extension"] = __version__, module is not None
    if module is None:
        return {**info, "extension_reason": reason, "cuda": False, "cuda_reason": f"no extension: {reason}"}
    return {**info, **module.build_info(), "version": __version__}
