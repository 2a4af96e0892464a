"""Adapters on disk: one safetensors file with lora_a, lora_b and gate of every adapter, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fastlora.adapt import adapters
from fastlora.files import write_atomically
from fastlora.modules.adapter import RankAdapter

FORMAT = "fastlora.adapter/1"
_TENSORS = ("lora_a", "lora_b", "gate")


def save_adapter(model: nn.Module, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """Write the adapters of `model`, at the ranks they hold, with their kappa and scaling.

    Args:
        path: file to write; one that exists is replaced in a single step.
        metadata: further string pairs for the file's header.
    Raises:
        ValueError: the model has no adapters.
        OSError: the folder cannot be written; an existing file is whole.
    """
    found = dict(adapters(model))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no adapters to save; call fastlora.inject(model, rank=...) first."
        )
    tensors = {f"{name}.{key}": getattr(a, key).detach().contiguous() for name, a in found.items() for key in _TENSORS}
    settings = {name: {"kappa": a.kappa, "scaling": a.scaling} for name, a in found.items()}
    header = {**(metadata or {}), "format": FORMAT, "settings": json.dumps(settings)}
    write_atomically(path, save(tensors, metadata=header))


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Read adapters into a model that was injected at the same places; their ranks become those of the file.

    Raises:
        ValueError: the file is no adapter file, or its modules or widths are not those of the model (named); no
            adapter has changed.
        OSError: the file cannot be read.
    """
    tensors, settings = read_adapter(path)
    found = dict(adapters(model))
    missing, extra = sorted(set(found) - set(settings)), sorted(set(settings) - set(found))
    if missing or extra:
        raise ValueError(
            f"{path} does not fit the model: it lacks {_some(missing)} and has {_some(extra)} besides. "
            "Inject the same targets, or load the file of this model."
        )
    for name, adapter in found.items():
        _check_fits(name, adapter, tensors, path)
    for name, adapter in found.items():
        lora_a, lora_b, gate = (tensors[f"{name}.{key}"] for key in _TENSORS)
        adapter._set(lora_a.to(adapter.lora_a), lora_b.to(adapter.lora_b), gate.to(adapter.gate))
        adapter.kappa, adapter.scaling = settings[name]["kappa"], settings[name]["scaling"]


def read_adapter(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """Tensors by key, and kappa and scaling by module, of an adapter file."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}). Save it again with save_adapter."
        ) from error
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {header.get('format')!r}; {FORMAT!r} is accepted. Save it with save_adapter."
        )
    settings = json.loads(header["settings"])
    wanted = {f"{name}.{key}" for name in settings for key in _TENSORS}
    if wanted != set(tensors):
        odd = sorted(wanted ^ set(tensors))
        raise ValueError(f"{path} is incomplete: its header and its tensors differ in {_some(odd)}. Save it again.")
    return tensors, settings


def _check_fits(name: str, adapter: RankAdapter, tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    lora_a, lora_b, gate = (tensors[f"{name}.{key}"] for key in _TENSORS)
    r = gate.numel()
    shapes = (list(lora_a.shape), list(lora_b.shape), list(gate.shape))
    wanted = ([r, adapter.in_features], [adapter.out_features, r], [r])
    if shapes != wanted:
        raise ValueError(f"{path}: {name} has shapes {shapes} of lora_a, lora_b, gate; the model takes {wanted}.")
    if not all(bool(torch.isfinite(t).all()) for t in (lora_a, lora_b, gate)):
        raise ValueError(f"{path}: {name} holds non-finite values; load an adapter from before training diverged.")


def _some(names: list[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
