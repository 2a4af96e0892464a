"""`make sanitize` finds what it is for: faults planted into a module that this very CMakeLists.txt builds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from csrc.sanitized import ROOT, build, environment

if not sys.platform.startswith("linux") or shutil.which("g++") is None:
    pytest.skip("needs Linux and g++", allow_module_level=True)
for name in ("cmake", "pybind11"):
    pytest.importorskip(name, reason=f"{name} is not installed; pip install 'fastlora[dev]'")
if find_spec("ninja") is None and shutil.which("make") is None:
    pytest.skip("needs ninja or make", allow_module_level=True)

PLANTED = """
#include <climits>
#include <cstdint>
#include <vector>
#pragma GCC visibility push(default)
extern "C" int right(int one) { std::vector<float> row(8); row[7 * one] = 1; return int(row[7]) + one; }
extern "C" int written_beyond_a_row(int one) { float* volatile row = new float[8]; row[8 * one] = 1; int n = int(row[0]); delete[] row; return n; }
extern "C" int overflow(int one) { return INT_MAX + one; }
extern "C" int misaligned(int one) { alignas(8) char bytes[16] = {}; return *reinterpret_cast<int*>(bytes + one); }
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory) -> Path:
    """The sources of the extension emptied, and the faults in one of them."""
    tree = tmp_path_factory.mktemp("sanitized")
    shutil.copy(ROOT / "CMakeLists.txt", tree)
    (tree / "csrc").mkdir()
    for name in re.findall(r"csrc/\w+\.cpp", (ROOT / "CMakeLists.txt").read_text()):
        (tree / name).write_text(PLANTED if name == "csrc/merge.cpp" else "")
    return build(tree, tree / "build")


@pytest.mark.parametrize(
    "fault, told",
    [
        ("written_beyond_a_row", "heap-buffer-overflow"),
        ("overflow", "signed integer overflow"),
        ("misaligned", "misaligned address"),
        ("right", None),
    ],
)
def test_a_fault_ends_the_process(module, fault, told):
    call = f"import ctypes; print(ctypes.CDLL({str(module)!r}).{fault}(1))"
    command = [sys.executable, "-S", "-c", call]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment(), timeout=60)
    if told is None:
        assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
    else:
        assert done.returncode != 0 and told in done.stderr and not done.stdout


def test_an_ordinary_python_is_not_checked(module):
    """The checks need their runtime before everything else, and say so; an ordinary build needs none."""
    done = subprocess.run([sys.executable, "-S", "-c", f"import ctypes; ctypes.CDLL({str(module)!r})"],
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode != 0 and "ASan runtime" in done.stderr
