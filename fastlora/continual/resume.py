"""Whether a run that was cut short and the command that is to go on with it are the same run.

Imports neither torch nor open_clip: a command that does not fit is refused at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastlora.continual.config import RunConfig, flat
from fastlora.continual.saved_run import read_run

_SHOWN = 5


def finished_already(path: Path, config: RunConfig) -> bool:
    """Whether the run at `path` has come to its end. Raises ValueError where `config` is not that of the run."""
    try:
        status = json.loads((path / "manifest.json").read_text()).get("status")
    except (OSError, ValueError, AttributeError, RecursionError):
        return False
    if status != "finished":
        return False
    check_same_config(path, read_run(path).config, config)
    return True


def check_same_config(path: Path, before: Mapping[str, Any], now: RunConfig) -> None:
    """Raises ValueError unless the run at `path` was configured as `now`, but for what may change; tells what differs."""
    old, new = (flat(json.loads(json.dumps(config))) for config in (before, now.as_dict()))
    if old.get("method.name") != new["method.name"]:  # their options differ by nature
        old, new = ({"method": config.get("method.name")} for config in (old, new))
    changed = [
        f"{key} was {_text(old, key)} and is {_text(new, key)} now"
        for key in new | old
        if key not in RunConfig.MAY_CHANGE and old.get(key) != new.get(key)
    ]
    if changed:
        raise ValueError(
            f"{path} cannot be resumed with another configuration: {_some(changed)}. Give the options that it was "
            f"started with (its config.yaml has them; {', '.join(RunConfig.MAY_CHANGE)} may change), or another --out."
        )


def check_same_model(path: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raises ValueError unless two fingerprints of the model before training are equal."""
    differing = [f"{name} is missing" for name in before if name not in now]
    differing += [f"{name} is new" for name in now if name not in before]
    for name in before:
        (kind, _, sha), (kind_now, _, sha_now) = (each.get(name, "").rpartition(" ") for each in (before, now))
        if name in now and kind != kind_now:
            differing.append(f"{name} was {kind} and is {kind_now} now")
        elif name in now and sha != sha_now:
            differing.append(f"{name} has other values")
    if differing:
        raise ValueError(
            f"{path} cannot be resumed with another model than it was started with ({_some(differing)}). Give the "
            "model from before training, in its dtype, or train again with another --out."
        )


def what_stopped(manifest: Mapping[str, Any]) -> str:
    """How the process before ended, in words."""
    status = manifest.get("status", "running")
    error = f" ({manifest['error']})" if manifest.get("error") else ""
    return {"running": "killed", "interrupted": "interrupted", "failed": f"stopped by an error{error}"}.get(
        status, status
    )


def changed_versions(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What of the machine and the software is another than in the manifest before: bits may depend on it."""
    keys = ("versions", "platform", "device", "threads", "processes")
    return {key: now[key] for key in keys if key in before and before[key] != now[key]}


def _text(config: Mapping[str, Any], key: str) -> str:
    return repr(config[key]) if key in config else "not set"


def _some(differences: list[str]) -> str:
    more = f" and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
    return "; ".join(differences[:_SHOWN]) + more
