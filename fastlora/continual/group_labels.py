"""Which runs belong together, and what to call them: settings that decide the figures, and those in which groups differ."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fastlora.continual.config import CONFIGS, RunConfig

# how a run is carried out and what it keeps, not what it computes
_NO_SETTINGS = (
    *("seed", "device", "backend", "eval_batch_size", "log_every", "checkpoints", "log_to"),
    *(name for name in RunConfig.MAY_CHANGE if name.startswith("data.")),
)


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of a run's config.yaml that decides its figures, the method's first, as 'rank' or 'run.KEY'.

    An option that is younger than the run has its default.
    """
    given = dict(config["method"])
    name = given.pop("name")
    method = (_defaults(CONFIGS[name]) if name in CONFIGS else {}) | given
    run = _defaults(RunConfig) | {key: value for key, value in config.items() if key != "method"}
    run = {key: value for key, value in _flat(run).items() if key not in _NO_SETTINGS}
    return {"name": name} | _flat(method) | {f"run.{key}": value for key, value in run.items()}


def labels_of(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """One label per mapping of `settings_of`: method, rank, and the options that set it apart from others of its method.

    An option is shown where it departs from its commonest value among the method's groups, or where none is commonest.
    """
    return [_label(mine, [other for other in settings if other["name"] == mine["name"]]) for mine in settings]


def is_control(method: Mapping[str, Any]) -> bool:
    """Whether these options make the method a control of itself: it must never go by its bare name."""
    return method.get("gates", "trained") != "trained"


def _label(mine: Mapping[str, Any], rivals: Sequence[Mapping[str, Any]]) -> str:
    parts = [mine["name"]] + ([f"r={mine['rank']}"] if "rank" in mine else [])
    for key in dict.fromkeys(key for other in rivals for key in other):
        if key in ("name", "rank"):
            continue
        counts = Counter(_key(other.get(key)) for other in rivals)
        (commonest, most), *others = counts.most_common()
        tied = bool(others) and others[0][1] == most
        if key == "gates" and is_control(mine):
            parts.append(f"gates={mine['gates']}")
        elif len(counts) > 1 and (tied or _key(mine.get(key)) != commonest):
            parts.append(f"{key}={_value(mine.get(key))}")
    return " ".join(parts)


def _defaults(config: Any) -> dict[str, Any]:
    return {
        field.name: field.default for field in dataclasses.fields(config) if field.default is not dataclasses.MISSING
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options within options as 'outer.inner'; tuples as lists, as YAML gives them back."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(_value(item) for item in value) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return str(value)
