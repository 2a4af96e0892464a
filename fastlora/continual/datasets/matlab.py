"""MATLAB files, by scipy in a process of its own: on 3 of 100 damaged files scipy's reader (1.17) ends its process.

Run as a program, this file prints the variables of a MATLAB file as JSON.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

_SECONDS = 120


class MatlabError(ValueError):
    """It is no such file, or is damaged."""


def parse_matlab(path: Path) -> dict[str, Any]:
    """Variables by name, each a list: numbers and texts, or for a structure its fields by name.

    Raises:
        MatlabError: the file is something else, or not whole.
        ImportError: scipy is not installed.
    """
    if importlib.util.find_spec("scipy.io") is None:
        raise ImportError(
            f"{path.name} is a MATLAB file, and scipy, which reads it, is not installed. Run: pip install scipy (it "
            "comes with 'fastlora[train]')"
        )
    command = [sys.executable, __file__, str(path.absolute())]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise MatlabError(f"scipy has not read it in {_SECONDS} s") from None
    if done.returncode:
        *_, last = ["", *done.stderr.decode(errors="replace").strip().splitlines()]
        raise MatlabError(last if done.returncode > 0 else f"scipy died of signal {-done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _print(path: str) -> None:
    from scipy.io import loadmat

    variables = loadmat(path, squeeze_me=True)
    found = {name: _plain(value) for name, value in variables.items() if not name.startswith("__")}
    print(json.dumps(found, default=lambda value: value.tolist()))


def _plain(value: Any) -> list[Any]:
    import numpy as np

    rows = np.atleast_1d(value)
    return [{name: row[name] for name in rows.dtype.names} for row in rows] if rows.dtype.names else rows.tolist()


if __name__ == "__main__":
    _print(sys.argv[1])
