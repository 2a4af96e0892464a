"""Adapters as a directory that PEFT loads (made for, and tested with, PEFT 0.21)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from fastlora.adapt import adapters
from fastlora.adapter_file import some
from fastlora.checks import check_finite_gate
from fastlora.files import write_directory
from fastlora.interop.peft_config import CONFIG_NAME, LORA, WEIGHTS_NAME
from fastlora.interop.updates import QKV
from fastlora.modules.adapter import RankAdapter
from fastlora.modules.attention import FusedRankLoRAMultiheadAttention, PackedProjection, _PackedAttention

Factors = tuple[Tensor, Tensor]  # lora_A [R, K], lora_B [N, R], and the update is lora_B @ lora_A

_INSTEAD = "Export the merged model instead: fastlora.merge(model), fastlora.remove(model), and save its state_dict."


def export_peft(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the adapters of `model` so that `peft.PeftModel.from_pretrained(plain_model, directory)` computes the same.

    Gates, thresholds and scaling are folded into lora_B (in float64, rounded once to float32), dead ranks are dropped, and
    every module is written at the rank it has left: rank_pattern and alpha_pattern name it. Modules without an active
    rank are left out. q, k and v of an attention become one update of its in_proj_weight (target_parameters, PEFT >= 0.17):
    lora_A stacked, lora_B block-diagonal. Gates and kappa cannot be told apart again; `fastlora.save_adapter` keeps them.

    Args:
        model: stays as it is; after training, what it computes in evaluation is what is written (no dropout).
        directory: a new or an empty one, made in one step.
    Raises:
        ValueError: no adapters, none with an active rank, a value that is not finite (named), or a place where PEFT would
            compute something else (named): out_proj of nn.MultiheadAttention, anything in nn.TransformerEncoderLayer, and
            a model that is itself an adapted layer.
        FileExistsError: something is at `directory` already.
        OSError: it cannot be written. Nothing was written.
    """
    found = dict(adapters(model))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no adapters to export; call fastlora.inject(model, rank=...) first."
        )
    active = {name: factors for name, adapter in found.items() if (factors := _folded(name, adapter)) is not None}
    if not active:
        raise ValueError(
            f"none of the {len(found)} adapters has an active rank, so the plain model computes the same; there is nothing "
            "to export."
        )
    _refuse(model, active)
    linear = {name: factors for name, factors in active.items() if not isinstance(found[name], PackedProjection)}
    packed = _packed({name: factors for name, factors in active.items() if name not in linear})
    rank = max(lora_a.shape[0] for lora_a, _ in (*linear.values(), *packed.values()))
    packed = {name: _padded(factors, rank) for name, factors in (packed | _bystanders(model, packed)).items()}
    transposed = bool(linear) and all(found[name].transposed for name in linear)
    tensors, config = _tensors(linear | packed, packed), _config(model, rank, linear, packed, transposed)
    write_directory(directory, {WEIGHTS_NAME: save(tensors, {"format": "pt"}), CONFIG_NAME: config.encode()})


def _folded(name: str, adapter: RankAdapter) -> Factors | None:
    """The factors without gates, on the CPU; None without an active rank."""
    check_finite_gate(adapter.gate, f"{name}.gate")
    gate = adapter.scaling * adapter.effective_gate().double()
    keep = gate.nonzero().flatten()
    if not keep.numel():
        return None
    dtype = torch.promote_types(adapter.lora_b.dtype, torch.float32)
    lora_a = adapter.lora_a.detach().index_select(0, keep).to(dtype).cpu()
    lora_b = (adapter.lora_b.detach().double() * gate)[:, keep].to(dtype).cpu()
    if not (torch.isfinite(lora_a).all() and torch.isfinite(lora_b).all()):
        raise ValueError(
            f"{name} holds non-finite values, or they are so with its gates multiplied in; export an adapter from before "
            "training diverged."
        )
    return lora_a, lora_b.contiguous()


def _refuse(model: nn.Module, active: Mapping[str, Factors]) -> None:
    if "" in active:
        raise ValueError(
            "the model is itself an adapted layer, which PEFT cannot replace. Export a model that holds it."
        )
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in active}
    if "" in (name.rpartition(".")[0] for name in active if isinstance(owners[name], _PackedAttention)):
        raise ValueError(
            "the model is itself an adapted attention, which PEFT cannot replace. Export one that holds it."
        )
    twice = [
        name
        for name, owner in owners.items()
        if isinstance(owner, FusedRankLoRAMultiheadAttention) and name.rpartition(".")[2] == "out_proj"
    ]
    if twice:
        raise ValueError(
            f"{some(twice)}: PEFT (0.21) adds an update of the out_proj of nn.MultiheadAttention twice, or never, and so "
            f"would compute something else. {_INSTEAD} Or train without targets 'out'."
        )
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.TransformerEncoderLayer)]
    skipped = [name for name in active if any(name.startswith(f"{layer}." if layer else "") for layer in layers)]
    if skipped:
        raise ValueError(
            f"{some(skipped)}: in evaluation nn.TransformerEncoderLayer reads weights without calling the layers, and PEFT's "
            f"adapters would be skipped. {_INSTEAD}"
        )


def _packed(parts: Mapping[str, Factors]) -> dict[str, Factors]:
    """One update of in_proj_weight for the q, k and v of each attention.

    By target_parameters: PEFT's adapter of a whole nn.MultiheadAttention adds to the weights at each call and subtracts
    again, after which they have other bits, and it brings an update of out_proj along.
    """
    owners = dict.fromkeys(name.rpartition(".")[0] for name in parts)
    return {owner: _stacked([parts.get(f"{owner}.{part}") for part in QKV]) for owner in owners}


def _stacked(parts: list[Factors | None]) -> Factors:
    """lora_A of the parts above each other; lora_B [3 d, R] with each part's own in its rows and columns."""
    present = [part for part in parts if part is not None]
    width = present[0][1].shape[0]
    lora_a = torch.cat([lora_a for lora_a, _ in present])
    blocks = [torch.empty(width, 0) if part is None else part[1] for part in parts]
    return lora_a, torch.block_diag(*blocks).to(lora_a.dtype)


def _bystanders(model: nn.Module, packed: Mapping[str, Factors]) -> dict[str, Factors]:
    """Updates of rank 0 for attentions that PEFT adapts too: it takes a target for the end of a name, not for all of it."""
    found = {}
    for name, module in model.named_modules():
        weight = dict(module.named_parameters(recurse=False)).get("in_proj_weight")
        if weight is not None and name not in packed and any(name.endswith(f".{target}") for target in packed):
            found[name] = (torch.zeros(0, weight.shape[1]), torch.zeros(weight.shape[0], 0))
    return found


def _padded(factors: Factors, rank: int) -> Factors:
    """With ranks of zeros: PEFT minds the rank_pattern of a parameter, and warns that it does not."""
    lora_a, lora_b = factors
    more = rank - lora_a.shape[0]
    return F.pad(lora_a, (0, 0, 0, more)), F.pad(lora_b, (0, more))


def _tensors(updates: Mapping[str, Factors], packed: Mapping[str, Factors]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, (lora_a, lora_b) in updates.items():
        parent, _, last = name.rpartition(".")
        # a layer within an attention whose in_proj_weight is adapted: PEFT has that one wrapped
        key = f"base_model.model.{parent}.base_layer.{last}" if parent in packed else f"base_model.model.{name}"
        tensors |= {f"{key}.lora_A.weight": lora_a, f"{key}.lora_B.weight": lora_b}
    return tensors


def _config(
    model: nn.Module, rank: int, linear: Mapping[str, Factors], packed: Mapping[str, Factors], transposed: bool
) -> str:
    ranks = {name: lora_a.shape[0] for name, (lora_a, _) in linear.items()}
    # alpha equals the rank everywhere, so that PEFT scales by 1
    pattern = {f"^{re.escape(name)}": each for name, each in ranks.items() if each != rank}
    base = getattr(model, "name_or_path", None)
    config = {
        "peft_type": LORA,
        "base_model_name_or_path": base if isinstance(base, str) and base else None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": _targets(model, list(linear)),
        "target_parameters": [f"{name}.in_proj_weight" for name in packed] or None,
        "fan_in_fan_out": transposed,  # of Conv1D; where there are both kinds of layers, PEFT warns and does the right thing
        "lora_dropout": 0.0,
        "bias": "none",
    }
    return json.dumps(config, indent=2) + "\n"


def _targets(model: nn.Module, names: list[str]) -> list[str] | str:
    """The names, or a regular expression for them where PEFT would take one of them for the end of another's."""
    others = (name for name, _ in model.named_modules() if name not in names)
    endings = tuple(f".{name}" for name in names)
    if any(other.endswith(endings) for other in others):
        return "|".join(re.escape(name) for name in names)
    return names
