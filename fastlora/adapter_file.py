"""Adapters on disk: one safetensors file with lora_a, lora_b and gate of every adapter, written whole or not at all."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from fastlora.adapt import adapter_parameters, adapters
from fastlora.checks import check_kappa, check_scaling
from fastlora.files import write_atomically
from fastlora.fingerprint import checksum, fingerprint, kind
from fastlora.interrupts import uninterrupted
from fastlora.tensor_file import read_tensors
from fastlora.tied import has_memory, owners

FORMAT = "fastlora.adapter/2"
# without a checksum; still read, since its adapters are as good as ever, but no journal takes it: it names no base
OLD_FORMAT = "fastlora.adapter/1"
_TENSORS = ("lora_a", "lora_b", "gate")


@dataclass(frozen=True)
class AdapterFile:
    """An adapter file as read and checked.

    Attributes:
        path: where it was read.
        header: its string pairs: format, settings, sha256, and what the writer added.
        settings: kappa and scaling by module.
        tensors: "MODULE.lora_a" [R, K], "MODULE.lora_b" [N, R] and "MODULE.gate" [R] of each module, on the CPU.
        hashes: fingerprint of the tensors.
        transposed: the modules whose weight is stored [K, N].
    """

    path: str
    header: dict[str, str]
    settings: dict[str, dict[str, float]]
    tensors: dict[str, Tensor]
    hashes: dict[str, str]
    transposed: frozenset[str]

    def adapter(self, module: str) -> tuple[Tensor, Tensor, Tensor]:
        """lora_a, lora_b and gate of a module."""
        lora_a, lora_b, gate = (self.tensors[f"{module}.{key}"] for key in _TENSORS)
        return lora_a, lora_b, gate

    def check_fits(self, module: str, weight: Sequence[int]) -> None:
        """Raises ValueError unless the module's adapter fits a weight of this shape, [N, K], and is finite."""
        tensors = self.adapter(module)
        r = tensors[2].numel()
        shapes, wanted = [list(t.shape) for t in tensors], [[r, *weight[1:]], [*weight[:1], r], [r]]
        if shapes != wanted:
            raise ValueError(
                f"{self.path}: {module} has shapes {_listed(shapes)} of lora_a, lora_b, gate; the model takes "
                f"{_listed(wanted)}. Give the model that it was trained on."
            )
        if not all(bool(torch.isfinite(t).all()) for t in tensors):
            raise ValueError(
                f"{self.path}: {module} holds non-finite values; load an adapter from before training diverged."
            )


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a file of the model's adapters, by their keys in it; they share the parameters' memory."""
    return {f"{name}.{key}": getattr(a, key).detach() for name, a in adapters(model) for key in _TENSORS}


def save_adapter(model: nn.Module, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """Write the adapters of `model`, at the ranks they hold, with their kappa and scaling and a checksum of it all.

    The file also knows the weights that no adapter updates, by a hash of a sample: `load_adapter` warns over others.

    Args:
        model: with adapters; it does not change.
        path: file to write; one that exists is replaced in a single step.
        metadata: further string pairs for the file's header.
    Raises:
        ValueError: the model has no adapters.
        OSError: the folder cannot be written; an existing file is whole.
    """
    tensors = {key: tensor.contiguous() for key, tensor in adapter_tensors(model).items()}
    if not tensors:
        raise ValueError(
            f"{type(model).__name__} has no adapters to save; call fastlora.inject(model, rank=...) first."
        )
    # "transposed" where it is so: the delta of a square weight fits either way
    settings = {
        name: {"kappa": a.kappa, "scaling": a.scaling} | ({"transposed": True} if a.transposed else {})
        for name, a in adapters(model)
    }
    header = {**(metadata or {}), "format": FORMAT, "settings": json.dumps(settings), "frame": _frame(model)}
    header["sha256"] = checksum(header, fingerprint(tensors))
    write_atomically(path, save(tensors, metadata=header))


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Read adapters into a model that was injected at the same places; their ranks become those of the file.

    Warns (RuntimeWarning) where the weights that no adapter updates are others than when the file was saved: another
    model of the same shapes, another dtype, or something trained beside the adapters that the file does not hold.

    Args:
        model: with an adapter wherever the file has one; written in place, on whatever device it is.
        path: what `save_adapter`, a journal or a run has written.
    Raises:
        ValueError: the file is no adapter file, is damaged, or its modules or widths are not those of the model
            (named); no adapter has changed.
        OSError: the file cannot be read.
    """
    file = read_adapter(path)
    found = dict(adapters(model))
    missing, extra = sorted(set(found) - set(file.settings)), sorted(set(file.settings) - set(found))
    if missing or extra:
        raise ValueError(
            f"{path} does not fit the model: it lacks {some(missing)} and has {some(extra)} besides. "
            "Inject the same targets, or load the file of this model."
        )
    for name, adapter in found.items():
        file.check_fits(name, (adapter.out_features, adapter.in_features))
    saved_over = file.header.get("frame")
    if saved_over and saved_over != _frame(model):
        warnings.warn(
            f"{path} was saved over other weights than those of this {type(model).__name__} (of what no adapter updates): "
            "it is another model of the same shapes, in another dtype, or was trained beside its adapters. The adapters "
            "are loaded; what they do here is not what was trained there.",
            RuntimeWarning,
            stacklevel=2,
        )
    loaded = {  # moved first: whatever fails here, nothing has changed
        name: [tensor.to(own) for tensor, own in zip(file.adapter(name), (a.lora_a, a.lora_b, a.gate))]
        for name, a in found.items()
    }
    with uninterrupted():
        for name, adapter in found.items():
            adapter._set(*loaded[name])
            adapter.kappa, adapter.scaling = file.settings[name]["kappa"], file.settings[name]["scaling"]


def read_adapter(path: str | os.PathLike[str]) -> AdapterFile:
    """Read an adapter file and compare it with its checksum; nothing of it is ever executed.

    Raises:
        ValueError: the file is no adapter file, is not complete, holds other numbers than floating ones, or some bit of
            it has changed.
        OSError: the file cannot be read.
    """
    header, tensors = _read(path)
    if header.get("format") not in (FORMAT, OLD_FORMAT):
        raise ValueError(
            f"{path} has format {header.get('format')!r}; {FORMAT!r} and {OLD_FORMAT!r} are accepted. "
            "Save it with save_adapter."
        )
    settings = _settings(header, path)
    wanted = {f"{name}.{key}" for name in settings for key in _TENSORS}
    if wanted != set(tensors):
        odd = sorted(wanted ^ set(tensors))
        raise ValueError(f"{path} is incomplete: its header and its tensors differ in {some(odd)}. Save it again.")
    _check_floating(path, tensors)
    hashes = fingerprint(tensors)
    if header["format"] == FORMAT and header.get("sha256") != checksum(header, hashes):
        raise ValueError(
            f"{path} is damaged: its content has another SHA-256 than its header tells. Restore it from a copy, or "
            "save it again with save_adapter."
        )
    transposed = frozenset(name for name, each in json.loads(header["settings"]).items() if each.get("transposed"))
    return AdapterFile(os.fspath(path), header, settings, tensors, hashes, transposed)


def _frame(model: nn.Module) -> str:
    """SHA-256 of the parameters that no adapter updates: a merge leaves them as they are. "" where some are not at hand.

    Of a sample of each, since another model differs everywhere: to hash all of 7 billion parameters takes 8 s.
    """
    found = dict(adapters(model))
    other = {id(parameter) for parameter in adapter_parameters(model)}
    updated = {name for names in owners(model, found).values() for name in names}
    frame = {name: p.detach() for name, p in model.named_parameters() if name not in updated and id(p) not in other}
    if not all(has_memory(p) or not p.numel() for p in frame.values()):
        return ""
    sampled = fingerprint({name: p.reshape(-1)[:: p.numel() // 1024 + 1] for name, p in frame.items()})
    return checksum({}, {name: f"{kind(p)} {sampled[name]}" for name, p in frame.items()})


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        return read_tensors(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}). Restore it from a copy, or save it again with "
            "save_adapter."
        ) from error


def _check_floating(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    odd = sorted(key for key, tensor in tensors.items() if not tensor.is_floating_point())
    if odd:
        raise ValueError(
            f"{path}: {odd[0]} is {kind(tensors[odd[0]])}; an adapter is of floating-point numbers. Restore the file from a "
            "copy, or save it again with save_adapter."
        )


def _settings(header: Mapping[str, str], path: str | os.PathLike[str]) -> dict[str, dict[str, float]]:
    try:
        settings = {
            name: {"kappa": float(each["kappa"]), "scaling": float(each["scaling"])}
            for name, each in json.loads(header["settings"]).items()
        }
        for each in settings.values():
            check_kappa(each["kappa"])
            check_scaling(each["scaling"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{path} tells no kappa and scaling of each module ({type(error).__name__}: {error}). Restore it from a "
            "copy, or save it again with save_adapter."
        ) from error
    return settings


def some(names: list[str]) -> str:
    """The first three of some names, and the number of the others."""
    if not names:
        return "nothing"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _listed(shapes: list[list[int]]) -> str:
    return f"({', '.join(map(str, shapes))})"
