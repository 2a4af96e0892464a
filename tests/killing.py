"""Children that are killed in the middle of their work."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any


def killed_after(seconds: float, work: Callable[[], Any]) -> bool:
    """Whether `work`, done in a child, was killed before it had come to an end; it must not fail by itself."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert os.waitstatus_to_exitcode(status) == 0, "the work failed by itself"
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
