"""Every shipped tile of every kernel compiled for every target, within its limits: minutes, so a file of its own.

`make aot` compiles every role, rank and alignment of each tile as well; this is one compile a tile.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fastlora.triton_kernels import aot


@pytest.mark.parametrize("target", aot.TARGETS)
def test_every_tile_compiles_within_the_limits(target):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastlora.triton_kernels.aot", "--quick", "--jobs", "1", "--targets", target]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    broken = [line for line in done.stdout.splitlines() if line.startswith(target) and not line.endswith(" ok")]
    assert done.returncode == 0 and not broken, "\n".join(broken) or done.stderr
    assert "0 break a limit" in done.stdout
