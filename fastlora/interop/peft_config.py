"""adapter_config.json of PEFT (read against version 0.21): what it says of each module, and what is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
LORA, ADALORA = "LORA", "ADALORA"

# what decides about training, or about where adapters were put, and not about what they compute; of target_modules and its
# like the tensors of the file say the outcome
_WITHOUT_EFFECT = {
    "peft_type", "auto_mapping", "base_model_name_or_path", "peft_version", "revision", "task_type", "inference_mode",
    "runtime_config", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "bias",
    "target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern", "lora_dropout",
    "fan_in_fan_out",  # whether weights are stored [K, N]; the layer knows, and PEFT corrects what says otherwise
    "qalora_group_size", "megatron_core", "eva_config", "corda_config", "lora_ga_config", "loftq_config",
    "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
}  # fmt: skip
# starts that leave the base weights as they are; the others (pissa, olora, corda, loftq, lora_ga) change them
_STARTS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
_REASONS = {
    "use_dora": "DoRA scales the rows of the whole sum W + dW by a trained magnitude, which no low-rank update of W equals",
    "modules_to_save": "whole modules were trained beside the adapters",
    "lora_bias": "the adapters have biases of their own",
    "trainable_token_indices": "rows of the embedding were trained beside the adapters",
    "layer_replication": "the layers of the base model were repeated",
}
MERGE = "Merge it with PEFT (merge_and_unload), and use the merged model."

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class PeftConfig:
    """A configuration as read and checked.

    Attributes:
        path: of the file.
        kind: "LORA" or "ADALORA".
        rank, alpha: of a module that no pattern names.
        rank_pattern, alpha_pattern: by regular expression; AdaLoRA's rank pattern is by name, with the ranks it kept.
        rs: rsLoRA, which scales by alpha / sqrt(rank).
        targets, excluded: a regular expression, names, or nothing.
        parameters: names of adapted parameters, such as X.in_proj_weight.
        some_layers: adapters were put into some layers alone.
    """

    path: Path
    kind: str
    rank: int
    alpha: float
    rank_pattern: dict[str, Any]
    alpha_pattern: dict[str, float]
    rs: bool
    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...]
    parameters: tuple[str, ...]
    some_layers: bool

    def ranks(self, module: str) -> int:
        """The rank that the configuration gives a module."""
        if self.kind == ADALORA:
            kept = self.rank_pattern.get(f"{module}.lora_E")
            return self.rank if kept is None else sum(kept)
        return _matching(self.rank_pattern, self._key(module), self.rank)

    def scaling(self, module: str, rank: int) -> float:
        """The factor of a module's update; AdaLoRA divides by its first rank also after it gave ranks up."""
        if self.kind == ADALORA:
            return (self.alpha if self.alpha > 0 else rank) / (self.rank + 1e-5)
        alpha = _matching(self.alpha_pattern, self._key(module), self.alpha)
        return alpha / math.sqrt(rank) if self.rs else alpha / rank

    def names(self, module: str, parameter: str) -> bool:
        """Whether an adapter belongs on `module`, whose weight has the name `parameter`."""
        if self._parameter(module, (parameter,)):
            return True
        return not _matches(self.excluded, module) and _matches(self.targets, module)

    def _key(self, module: str) -> str:
        """What patterns are held against: for an adapted parameter its own name."""
        return self._parameter(module, ("in_proj_weight", "weight")) or module

    def _parameter(self, module: str, names: tuple[str, ...]) -> str | None:
        keys = (f"{module}.{name}" for name in names)
        return next((key for key in keys if _matches(self.parameters, key)), None)


def read_config(path: Path) -> PeftConfig:
    """Read and check an adapter_config.json.

    Raises:
        ValueError: it is no such file, or says something that gated adapters do not compute; the message tells what to do.
        OSError: it cannot be read.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}). Restore it from a copy, or save the adapter again.") from error
    if not isinstance(config, dict) or config.get("peft_type") not in (LORA, ADALORA):
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ValueError(f"{path} has peft_type {kind!r}; {LORA!r} and {ADALORA!r} are accepted. {MERGE}")
    _refuse(path, config)
    try:
        return _parsed(path, config)
    except (TypeError, ValueError, KeyError, re.error) as error:
        raise ValueError(
            f"{path} cannot be understood ({type(error).__name__}: {error}). Restore it from a copy, or save the adapter "
            "again."
        ) from error


def _refuse(path: Path, config: Mapping[str, Any]) -> None:
    start, bias = str(config.get("init_lora_weights", True)).lower(), config.get("bias", "none")
    if bias != "none":
        raise ValueError(
            f"{path} has bias={bias!r}: biases of the base model were trained beside the adapters. {MERGE}"
        )
    if start not in _STARTS:
        raise ValueError(
            f"{path} has init_lora_weights={start!r}, a start that changes the base weights as well. Save it with PEFT as a "
            "plain LoRA (save_pretrained(..., path_initial_model_for_weight_conversion=...)), or merge it there."
        )
    for key, value in config.items():
        if value and key not in _WITHOUT_EFFECT:
            reason = _REASONS.get(key, "what that computes is not known here")
            raise ValueError(f"{path} has {key}={value!r}: {reason}. {MERGE}")


def _parsed(path: Path, config: Mapping[str, Any]) -> PeftConfig:
    kind, ada = config["peft_type"], config["peft_type"] == ADALORA
    patterns = config.get("rank_pattern") or {}
    return PeftConfig(
        path=path,
        kind=kind,
        rank=_whole(config.get("init_r", 12) if ada else config.get("r", 8)),
        alpha=_number(config.get("lora_alpha", 8)),
        rank_pattern=_pattern(patterns, _kept) if ada else _pattern(patterns, _whole, compiled=True),
        alpha_pattern={} if ada else _pattern(config.get("alpha_pattern") or {}, _number, compiled=True),
        rs=bool(config.get("use_rslora", False)) and not ada,
        targets=_targets(config.get("target_modules")),
        excluded=_targets(config.get("exclude_modules")),
        parameters=tuple(config.get("target_parameters") or ()),
        some_layers=config.get("layers_to_transform") not in (None, []),
    )


def _targets(given: Any) -> str | tuple[str, ...]:
    if isinstance(given, str):
        # PEFT writes the names that it stands for; a file with the word itself was written by hand
        return () if given.lower() == "all-linear" else re.compile(given).pattern
    return tuple(str(name) for name in given or ())


def _matches(targets: str | tuple[str, ...], name: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _matching(patterns: Mapping[str, _Value], key: str, default: _Value) -> _Value:
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", key)), default)


def _pattern(given: Mapping[str, Any], value: Callable[[Any], _Value], compiled: bool = False) -> dict[str, _Value]:
    if not isinstance(given, dict):
        raise TypeError(f"a pattern is a {type(given).__name__}, not names with values")
    if compiled:
        for pattern in given:
            re.compile(f"({pattern})")
    return {name: value(each) for name, each in given.items()}


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{value!r} is no rank")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no alpha")
    return float(value)


def _kept(value: Any) -> list[bool]:
    if not isinstance(value, list) or not all(isinstance(each, bool) for each in value):
        raise ValueError("a rank pattern of AdaLoRA must list true and false")
    return value
