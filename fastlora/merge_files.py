"""Merging an adapter file into a file of weights, without building a model."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastlora.adapter_file import read_adapter
from fastlora.files import write_atomically
from fastlora.ops.merge import MergeReport, merge_
from fastlora.reference import soft_threshold

_PACKED = ("q", "k", "v")  # row blocks of in_proj_weight, in this order


def merge_files(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    force: bool = False,
) -> MergeReport:
    """Write the weights of `base` with the update of `adapter` added, in their own dtypes.

    Args:
        base: safetensors file with the state_dict of an open_clip model (or any model that the adapters' names fit).
        adapter: file from `fastlora.save_adapter`, such as adapters/task_01.safetensors of a run.
        out: file to write, in one step.
        force: replace `out` where it exists.
    Raises:
        FileExistsError: `out` exists and force is False.
        ValueError: a file cannot be read, or the adapter does not fit the weights; the module is named.
        MergeError: an adapter is not finite, or a sum overflows. Whatever is raised, `out` has not changed.
    """
    out = Path(out)
    if out.exists() and not force:
        raise FileExistsError(f"{out} exists; it is not overwritten without --force. Give another --out, or --force.")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"{out.absolute().parent} is no directory, so {out.name} cannot be written there. Make it first."
        )
    state, metadata = _read_state(Path(base))
    tensors, settings = read_adapter(adapter)
    names = list(settings)
    report = merge_(
        [_weight_of(state, name, tensors[f"{name}.lora_b"], Path(base)) for name in names],
        [tensors[f"{name}.lora_a"] for name in names],
        [tensors[f"{name}.lora_b"] for name in names],
        [soft_threshold(tensors[f"{name}.gate"], settings[name]["kappa"]) for name in names],
        scaling=[settings[name]["scaling"] for name in names],
        names=names,
    )
    write_atomically(out, save(state, metadata))
    return report


def _read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, {"format": "pt", **(file.metadata() or {})}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}). Give a state_dict saved as one."
        ) from None


def _weight_of(state: dict[str, Tensor], name: str, lora_b: Tensor, path: Path) -> Tensor:
    """The weight that module `name` updates; for q, k and v their rows of the packed projection."""
    if f"{name}.weight" in state:
        return state[f"{name}.weight"]
    parent, _, part = name.rpartition(".")
    packed = state.get(f"{parent}.in_proj_weight")
    if part not in _PACKED or packed is None:
        near = difflib.get_close_matches(name, state, n=1, cutoff=0.3)
        hint = f" Nearest is {near[0]}." if near else ""
        raise ValueError(
            f"{path} has no weight for the adapter of {name}.{hint} Give the weights that it was trained on."
        )
    rows = lora_b.shape[0]
    if packed.shape[0] != 3 * rows:
        raise ValueError(
            f"{path}: {parent}.in_proj_weight has shape {list(packed.shape)}; with lora_b {list(lora_b.shape)} "
            f"of {name} it must have {3 * rows} rows. Give the weights that the adapter was trained on."
        )
    return torch.chunk(packed, 3)[_PACKED.index(part)]
