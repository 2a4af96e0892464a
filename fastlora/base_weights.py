"""The frozen weights beneath a model's adapters: by name, by the adapter that updates them, and merged from files."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from fastlora.adapt import adapter_parameters
from fastlora.adapter_file import AdapterFile
from fastlora.ops.merge import MergeReport, merge_, new_residuals
from fastlora.reference import soft_threshold

_PACKED = ("q", "k", "v")  # row blocks of in_proj_weight, in this order


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter that belongs to no adapter, under its name in the plain model; the tensors share its memory."""
    adapted = {id(parameter) for parameter in adapter_parameters(model)}
    named = model.named_parameters(remove_duplicate=False)
    return {name: parameter.detach() for name, parameter in named if id(parameter) not in adapted}


def host_of(weights: Collection[str], module: str, where: str) -> str:
    """Name of the weight that the adapter of `module` updates: its own, or the packed one of q, k and v.

    Raises:
        ValueError: there is none; `where` names the weights in the message.
    """
    parent, _, part = module.rpartition(".")
    own, packed = _join(module, "weight"), _join(parent, "in_proj_weight")
    if own in weights:
        return own
    if part in _PACKED and packed in weights:
        return packed
    near = difflib.get_close_matches(module, weights, n=1, cutoff=0.3)
    hint = f" Nearest is {near[0]}." if near else ""
    raise ValueError(
        f"{where} has no weight for the adapter of {module}.{hint} Give the weights that it was trained on."
    )


def merge_adapter(
    file: AdapterFile, weights: Mapping[str, Tensor], where: str, residuals: dict[str, Tensor] | None = None
) -> MergeReport:
    """Add the updates of an adapter file to the weights, in place and in one call of `fastlora.ops.merge_`.

    Rounds as the file's writer did, where its header tells (`merge`). residuals: by module, as in `fastlora.merge`.

    Raises:
        ValueError: an adapter does not fit its weight, or is not finite. MergeError: a sum overflows. No weight has
            changed.
    """
    names = list(file.settings)
    targets = [_target(file, weights, name, where) for name in names]
    columns = [[t.to(weight.device) for t in file.adapter(name)] for name, weight in zip(names, targets)]
    gates = [soft_threshold(gate, file.settings[name]["kappa"]) for name, (_, _, gate) in zip(names, columns)]
    if residuals is not None:
        fresh = [(name, target) for name, target in zip(names, targets) if name not in residuals]
        residuals |= {name: new_residuals([target])[0] for name, target in fresh}
    return merge_(
        targets,
        [lora_a for lora_a, _, _ in columns],
        [lora_b for _, lora_b, _ in columns],
        gates,
        scaling=[file.settings[name]["scaling"] for name in names],
        names=names,
        residuals=None if residuals is None else [residuals[name] for name in names],
        **json.loads(file.header.get("merge", "{}")),
    )


def _target(file: AdapterFile, weights: Mapping[str, Tensor], module: str, where: str) -> Tensor:
    """The [N, K] weight of a module, a transposed view of one stored [K, N]; for q, k and v their rows of the packed."""
    host = host_of(weights, module, where)
    weight = weights[host]
    if module in file.transposed and weight.dim() == 2:
        weight = weight.t()
    if host == _join(module, "weight"):
        file.check_fits(module, weight.shape)
        return weight
    rows = file.adapter(module)[1].shape[0]
    if weight.shape[0] != len(_PACKED) * rows:
        raise ValueError(
            f"{where}: {host} has shape {list(weight.shape)}; with {rows} rows in lora_b of {module} it must have "
            f"{len(_PACKED) * rows} rows. Give the weights that the adapter was trained on."
        )
    part = torch.chunk(weight, len(_PACKED))[_PACKED.index(module.rpartition(".")[2])]
    file.check_fits(module, part.shape)
    return part


def _join(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name
