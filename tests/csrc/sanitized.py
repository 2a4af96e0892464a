"""The tests of the extension with a build that stops at the first address or operation that C++ does not allow: `make
sanitize`.

    python tests/csrc/sanitized.py [arguments of pytest]

Builds with FASTLORA_SANITIZE (CMakeLists.txt) into build/sanitize, where the installed extension is not touched; a few
minutes with GCC, most of them for the first build. Leaks are not looked for: Python and torch keep much until they end.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitize"
CHECKS = "address,undefined"
# what calls fastlora._C; the others find nothing in it that these do not
TESTS = (
    "tests/csrc", "tests/ops/test_merge.py", "tests/ops/test_merge_rounding.py", "tests/ops/test_merge_refusals.py",
    "tests/ops/test_prox_adamw.py", "tests/optim",
)  # fmt: skip


def build(source: Path, folder: Path) -> Path:
    """The extension of a source tree with every check of CHECKS, built in `folder`."""
    import pybind11

    cmake = [sys.executable, "-m", "cmake"] if importlib.util.find_spec("cmake") else ["cmake"]
    choices = {
        "CMAKE_BUILD_TYPE": "None",  # no flags but those of the file
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "FASTLORA_SANITIZE": CHECKS,
    }
    given = [f"-D{name}={value}" for name, value in choices.items()]
    subprocess.run([*cmake, "-S", source, "-B", folder, *given], check=True, stdout=subprocess.DEVNULL)
    jobs = str(os.cpu_count() or 1)
    subprocess.run([*cmake, "--build", folder, "--parallel", jobs], check=True, stdout=subprocess.DEVNULL)
    return folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def environment() -> dict[str, str]:
    """What a Python needs into which a library with the checks is loaded: their runtime comes before everything else."""
    compiler = os.environ.get("CXX", "g++")
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    return {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }


def pytest_configure() -> None:
    """As a plugin: `fastlora._C` is the module that $FASTLORA_SANITIZED names."""
    path = os.environ["FASTLORA_SANITIZED"]
    spec = importlib.util.spec_from_file_location("fastlora._C", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["fastlora._C"] = module
    from fastlora.build import extension

    assert extension() is module


def main() -> None:
    module = build(ROOT, BUILD)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    variables = os.environ | environment() | {"FASTLORA_SANITIZED": str(module), "PYTHONPATH": paths}
    pytest = [sys.executable, "-P"] if sys.version_info >= (3, 11) else [sys.executable]
    # --capture=sys: what the checks tell goes past Python, and must be seen when the process ends
    pytest += ["-m", "pytest", "-p", "csrc.sanitized", "-q", "--capture=sys", *(sys.argv[1:] or TESTS)]
    os.chdir(ROOT)
    os.execve(sys.executable, pytest, variables)


if __name__ == "__main__":
    main()
