"""Checkpoints of the released code of CoDyRA (arXiv 2412.01004) and SoRA (arXiv 2311.11696), as adapters of a model.

Both hold lora_A [R, K], lora_B [N, R] and gate [1, R] of each module, in files of torch.save.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastlora.adapt import InjectReport
from fastlora.adapter_file import some
from fastlora.interop.updates import QKV, Update, install
from fastlora.modules.attention import _PackedAttention, is_attention

_CODYRA, _OLD = ("lora_A", "lora_B", "gate"), ("old_lora_A", "old_lora_B")
_SORA = ("lora.lora_A", "lora.lora_B", "lora.gate")

Parts = dict[str, dict[str, Tensor]]


def import_codyra(model: nn.Module, path: str | os.PathLike[str]) -> InjectReport:
    """Make a checkpoint of CoDyRA's released code (its torch_save_lora) the adapters of `model`.

    The model then computes what the released one computes after `torch_load_lora`: the updates of earlier tasks
    (old_lora_A, old_lora_B), which that merges, are ranks with gate 1 here, beside those of the last task with their gates.
    `fastlora.prune` drops the ranks whose gate is 0; `fastlora.merge` puts all into the weights, before a next task.

    Args:
        model: the open_clip model, plain or adapted in just these places; changed in place. q_proj, k_proj and v_proj of
            the released code are q, k and v of its packed attentions.
        path: such as aircraft.pth; read with weights_only=True, or as .safetensors.
    Returns:
        InjectReport with the names of the adapters.
    Raises:
        ValueError: no such file, a damaged one, or one that does not fit the model; the model is unchanged.
        OSError: it cannot be read.
    """
    path = Path(path)
    content = _read(path)
    found, rest = _grouped(_state(content, path), (*_CODYRA, *_OLD))
    _check_found(found, rest, _CODYRA, path, "a checkpoint of SoRA is for import_sora")
    ranks = content.get("lora_ranks")
    modules = dict(model.named_modules())
    updates = {_our_name(modules, name): _codyra(name, parts, ranks, path) for name, parts in found.items()}
    return install(model, updates, str(path))


def import_sora(model: nn.Module, path: str | os.PathLike[str], *, alpha: float) -> InjectReport:
    """Make a checkpoint of SoRA's released code (pytorch_model.bin of its trainer) the adapters of `model`.

    SoRA trains other weights beside, such as a classifier and layer norms, and saves them in the same file: they are
    copied into the parameters of these names.

    Args:
        model: the plain transformers model, or one adapted in just these places; changed in place.
        path: read with weights_only=True, or as .safetensors.
        alpha: lora_alpha, which the file does not tell; config/lora_config.json of the released code has 16. An update is
            scaled by alpha / R.
    Returns:
        InjectReport with the names of the adapters.
    Raises:
        ValueError: no such file, a damaged one, or one that does not fit the model; the model is unchanged.
        TypeError: alpha is no number.
        OSError: the file cannot be read.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(f"alpha is a {type(alpha).__name__}; it must be a number, 16 in the released configuration.")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha is {alpha}; it must be finite, 16 in the released configuration.")
    path = Path(path)
    found, rest = _grouped(_state(_read(path), path), _SORA)
    _check_found(found, (), _SORA, path, "a checkpoint of CoDyRA is for import_codyra")
    weights = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    strange = [key for key, tensor in rest.items() if key not in weights or weights[key].shape != tensor.shape]
    if strange:
        raise ValueError(
            f"{path} holds {some(strange)}, which the model has not, or in another shape. Give the model that it was "
            "trained on (with its classifier)."
        )
    report = install(model, {name: _gated(name, parts, _SORA, alpha, path) for name, parts in found.items()}, str(path))
    with torch.no_grad():
        for key, tensor in rest.items():
            weights[key].copy_(tensor)
    return report


def _read(path: Path) -> dict[str, Any]:
    """The dictionary in a file; nothing in it is executed."""
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch.load raises whatever the bytes lead it to
        raise ValueError(
            f"{path} is damaged, or holds more than tensors ({type(error).__name__}). "
            "Restore it from a copy; of other objects keep the tensors alone, in the code that wrote them, and save again."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; tensors by name are accepted.")
    return content


def _state(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    state = content.get("state_dict", content)
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ValueError(f"{path} holds other things than tensors by name; a state_dict is accepted.")
    return state


def _grouped(state: Mapping[str, Tensor], endings: Iterable[str]) -> tuple[Parts, dict[str, Tensor]]:
    """Tensors by module and ending, and those of other names."""
    found: Parts = {}
    rest = {}
    for key, tensor in state.items():
        ending = next((ending for ending in endings if key.endswith(f".{ending}")), None)
        if ending is None:
            rest[key] = tensor
        else:
            found.setdefault(key.removesuffix(f".{ending}"), {})[ending] = tensor
    return found, rest


def _check_found(found: Parts, rest: Iterable[str], endings: tuple[str, ...], path: Path, hint: str) -> None:
    strange = sorted(rest)
    if not found or strange:
        raise ValueError(
            f"{path} holds {some(strange) if found else 'no module'} besides {', '.join(endings)} of modules; give what the "
            f"released code saves of the adapters alone ({hint})."
        )
    lacking = sorted(f"{name}.{ending}" for name, parts in found.items() for ending in endings if ending not in parts)
    if lacking:
        raise ValueError(f"{path} is incomplete: it lacks {some(lacking)}. Restore it from a copy, or save it again.")


def _our_name(modules: Mapping[str, nn.Module], name: str) -> str:
    """The released code takes packed attentions apart into q_proj, k_proj and v_proj."""
    parent, _, last = name.rpartition(".")
    attention, part = modules.get(parent), last.removesuffix("_proj")
    packed = isinstance(attention, _PackedAttention) or is_attention(attention)
    return f"{parent}.{part}" if packed and part in QKV else name


def _codyra(name: str, parts: Mapping[str, Tensor], ranks: Any, path: Path) -> Update:
    update = _gated(name, parts, _CODYRA, None, path)
    old = [parts[ending] for ending in _OLD if ending in parts]
    if len(old) == 1:
        raise ValueError(f"{path} is incomplete: it has one of {' and '.join(_OLD)} of {name} alone. Restore it.")
    rank, old_rank = update.gate.numel(), next(iter(old[0].shape), 0) if old else 0
    said = ranks.get(name) if isinstance(ranks, dict) else None
    if said is not None and said != {"rank": rank, "old_rank": old_rank}:
        raise ValueError(f"{path}: {name} has ranks {rank} and, old, {old_rank}; lora_ranks says {said}. Restore it.")
    if not old:
        return update
    given = [list(tensor.shape) for tensor in old]
    wanted = [[old_rank, update.lora_a.shape[1]], [update.lora_b.shape[0], old_rank]]
    if given != wanted:
        raise ValueError(f"{path}: {' and '.join(_OLD)} of {name} have shapes {given}; {wanted} would fit the others.")
    return Update(
        torch.cat([old[0], update.lora_a]),
        torch.cat([old[1], update.lora_b], dim=1),
        torch.cat([torch.ones(old_rank), update.gate]),
    )


def _gated(name: str, parts: Mapping[str, Tensor], endings: tuple[str, ...], alpha: float | None, path: Path) -> Update:
    lora_a, lora_b, gate = (parts[ending] for ending in endings)
    rank = gate.numel()
    shapes = [list(tensor.shape) for tensor in (lora_a, lora_b, gate)]
    if lora_a.dim() != 2 or lora_b.dim() != 2 or lora_a.shape[0] != rank or lora_b.shape[1] != rank or not rank:
        raise ValueError(
            f"{path}: {name} has {', '.join(endings)} of shapes {shapes}; [R, K], [N, R], [1, R] are accepted."
        )
    return Update(lora_a, lora_b, gate.flatten(), 1.0 if alpha is None else alpha / rank)
