"""Low-rank updates that a file of another project tells, put into a model: all of them, or none."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastlora.adapt import TARGETS, InjectReport, adapter_parameters, adapters, inject
from fastlora.adapter_file import some
from fastlora.modules.adapter import RankAdapter
from fastlora.modules.attention import PARTS, PackedProjection, is_attention, refuse_unsupported
from fastlora.modules.conv1d import is_conv1d

QKV = PARTS[:3]
# name of an adapter within an attention -> what `inject` calls it
_PART = {"q": "q", "k": "k", "v": "v", "out_proj": "out"}


@dataclass(frozen=True)
class Update:
    """scaling * lora_b @ diag(gate) @ lora_a, with lora_a [R, K], lora_b [N, R] and gate [R]; R may be 0."""

    lora_a: Tensor
    lora_b: Tensor
    gate: Tensor
    scaling: float = 1.0

    @classmethod
    def ungated(cls, lora_a: Tensor, lora_b: Tensor, scaling: float = 1.0) -> Update:
        """Of a LoRA without gates: they are 1."""
        return cls(lora_a, lora_b, torch.ones(lora_a.shape[0]), scaling)


def install(model: nn.Module, updates: Mapping[str, Update], source: str) -> InjectReport:
    """Make `updates` the adapters of `model`; layers that have none get one, and everything else is frozen.

    Args:
        model: changed in place.
        updates: by name of the adapter, which for q, k and v of an attention X is X.q, X.k and X.v.
        source: what to call the file in messages.
    Returns:
        InjectReport with the names.
    Raises:
        ValueError: a name, a shape or a value does not fit, or the model has other adapters besides. It is unchanged.
        TypeError: an update is for a layer that cannot be adapted. The model is unchanged.
    """
    if not updates:
        raise ValueError(f"{source} holds no update; the model without it computes the same.")
    modules, found = dict(model.named_modules()), dict(adapters(model))
    hosts = {name: _host(modules, name, source) for name in updates}
    for name, update in updates.items():
        _check(name, update, _weight_shape(modules, name, hosts[name]), source)
    extra = sorted(set(found) - set(updates))
    if extra:
        raise ValueError(
            f"the model has adapters that {source} says nothing of: {some(extra)}. Call fastlora.remove(model) first "
            "(after fastlora.merge(model), to keep what they learned)."
        )
    _inject(model, {name: host for name, host in hosts.items() if name not in found})
    for name, adapter in adapters(model):
        # of one attention a part may be adapted that this file adapts in another one alone: rank 0
        _set(adapter, updates.get(name) or _empty(adapter), fresh=name not in found)
    return InjectReport(tuple(updates), sum(p.numel() for p in adapter_parameters(model)))


def _host(modules: Mapping[str, nn.Module], name: str, source: str) -> str:
    """Name of the module that is an adapter `name`, or has to be adapted so that there is one."""
    parent, _, part = name.rpartition(".")
    module, attention = modules.get(name), modules.get(parent)
    if isinstance(module, RankAdapter):
        return name
    if part in _PART and is_attention(attention):
        refuse_unsupported(attention)
        return parent
    if isinstance(module, nn.Linear) or (module is not None and is_conv1d(module)):
        return name
    if module is not None:
        raise TypeError(
            f"{source} adapts {name!r}, which is a {type(module).__name__} here; nn.Linear, Conv1D and packed attentions are "
            "accepted. Merge the adapter where it was trained, and load the merged weights."
        )
    places = [
        each
        for each, module in modules.items()
        if isinstance(module, (nn.Linear, PackedProjection)) or is_conv1d(module)
    ]
    near = difflib.get_close_matches(name, places, 1, 0.3)
    raise ValueError(
        f"{source} adapts {name!r}, and the model has no such layer{f' (near: {near[0]})' if near else ''}. Give the model "
        "that it was trained on; one whose attentions are adapted in other parts needs fastlora.remove(model) first."
    )


def _weight_shape(modules: Mapping[str, nn.Module], name: str, host: str) -> list[int]:
    """[N, K] of the weight that an adapter `name` updates."""
    if name in modules:
        module: Any = modules[name]
        return [*module.weight.t().shape] if is_conv1d(module) else [module.out_features, module.in_features]
    width = cast(nn.MultiheadAttention, modules[host]).in_proj_weight.shape[1]  # or open_clip's
    return [width, width]


def _check(name: str, update: Update, weight: list[int], source: str) -> None:
    rank = update.gate.numel()
    given = [list(t.shape) for t in (update.lora_a, update.lora_b, update.gate)]
    wanted = [[rank, weight[1]], [weight[0], rank], [rank]]
    if given != wanted:
        raise ValueError(
            f"{source}: the update of {name} has shapes {given[0]} and {given[1]}, and {rank} gates; the weight here is "
            f"{weight}, which takes {wanted[0]} and {wanted[1]}. Give the model that it was trained on."
        )
    tensors = (update.lora_a, update.lora_b, update.gate)
    if not all(t.is_floating_point() for t in tensors):
        raise ValueError(
            f"{source}: {name} is of {', '.join(str(t.dtype) for t in tensors)}; floating point is accepted."
        )
    if not all(bool(torch.isfinite(t.float()).all()) for t in tensors):
        raise ValueError(f"{source}: {name} holds non-finite values; take a file from before training diverged.")


def _inject(model: nn.Module, hosts: Mapping[str, str]) -> None:
    """Adapters of rank 1 where there are none; `inject` checks all places before it changes anything."""
    selected = set(hosts.values())
    parts = {_PART[name.rpartition(".")[2]] for name, host in hosts.items() if name != host}
    targets = [target for target in TARGETS if target in parts] or TARGETS
    if selected:
        inject(model, 1, targets=targets, where=lambda name, module: name in selected, gate_init="ones")


def _empty(adapter: RankAdapter) -> Update:
    return Update.ungated(torch.empty(0, adapter.in_features), torch.empty(adapter.out_features, 0))


def _set(adapter: RankAdapter, update: Update, fresh: bool) -> None:
    if fresh:
        adapter.rank = max(1, update.gate.numel())  # that of the adapter which follows a merge
    adapter._set(
        update.lora_a.to(adapter.lora_a, copy=True),
        update.lora_b.to(adapter.lora_b, copy=True),
        update.gate.to(adapter.gate, copy=True),
    )
    adapter.kappa, adapter.scaling = 0.0, float(update.scaling)
