"""The one JSON of a run, rewritten atomically whenever a figure is added: whatever happens, what was measured is kept."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

SCHEMA = 1
NAME = "gpu_suite.json"


class State:
    """data: {"schema", "small", "started", "excluded", "install", "parts": {name: {"status", ...}}, "goals"}."""

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path, self.data = path, data

    @classmethod
    def new(cls, path: Path, small: bool, earlier: State | None = None) -> State:
        """earlier: a run whose finished parts are kept.

        Raises:
            ValueError: one of the two is a small run, the other is not.
        """
        data = {"schema": SCHEMA, "small": small, "started": time.strftime("%Y-%m-%d %H:%M:%S"), "excluded": {}}
        data |= {"install": {}, "parts": {}, "goals": []}
        if earlier is not None:
            if earlier.data["small"] != small:
                kind = "small" if earlier.data["small"] else "full"
                raise ValueError(f"{earlier.path} is of a {kind} run; resume it as one.")
            data["parts"] = {name: part for name, part in earlier.data["parts"].items() if part["status"] == "done"}
            # where correctness is asked again, a variant that was left out has its second chance
            data["excluded"] = dict(earlier.data["excluded"]) if "correctness" in data["parts"] else {}
        return cls(path, data)

    @classmethod
    def load(cls, path: Path) -> State:
        """
        Raises:
            ValueError: the file was written by another version of the suite.
        """
        data = json.loads(path.read_text())
        if data.get("schema") != SCHEMA:
            raise ValueError(f"{path} has schema {data.get('schema')}; this suite reads {SCHEMA}. Measure again.")
        return cls(path, data)

    def part(self, name: str) -> dict[str, Any]:
        return self.data["parts"].setdefault(name, {"status": "pending", "data": {}})

    def finish(self, name: str, status: str, **fields: Any) -> None:
        """status: "done", "failed" or "skipped"; fields: "seconds", "error", "reason"."""
        part = self.part(name)
        for stale in ("error", "reason", "item", "item_until"):
            part.pop(stale, None)
        part.update(status=status, **fields)
        self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".partial")
        scratch.write_text(json.dumps(_plain(self.data), indent=1, allow_nan=False) + "\n")
        os.replace(scratch, self.path)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: both become null."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
