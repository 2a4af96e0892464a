"""A directory that PEFT wrote, as adapters of a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastlora.adapt import InjectReport
from fastlora.adapter_file import some
from fastlora.interop.peft_config import ADALORA, CONFIG_NAME, MERGE, WEIGHTS_NAME, PeftConfig, read_config
from fastlora.interop.updates import QKV, Update, install
from fastlora.modules.attention import FusedRankLoRAMultiheadAttention, _PackedAttention, is_attention
from fastlora.modules.conv1d import is_conv1d

_PREFIX = "base_model.model."
_PICKLE = "adapter_model.bin"
_ENDINGS = {
    False: {".lora_A.weight": "A", ".lora_B.weight": "B"},
    True: {".lora_A": "A", ".lora_B": "B", ".lora_E": "E"},
}


def import_peft(model: nn.Module, directory: str | os.PathLike[str]) -> InjectReport:
    """Make a LoRA, rsLoRA or AdaLoRA that PEFT saved the adapters of `model`, with the outputs that PEFT computes.

    Layers without an adapter get one (see `fastlora.inject`), the others take its rank. LoRA's gates are 1; AdaLoRA's are
    its singular values lora_E, and ranks that it gave up are gone. lora_dropout is not taken over.

    Args:
        model: the plain base model, or one adapted in just these places; changed in place.
        directory: with adapter_config.json and adapter_model.safetensors. A pickle (adapter_model.bin) is never opened.
    Returns:
        InjectReport with the names of the adapters.
    Raises:
        ValueError: the files are damaged or do not fit each other or the model, or they hold what gated adapters do not
            compute (DoRA, trained biases, whole modules, ...); the message says what to do.
        TypeError: an adapter of a layer that is no nn.Linear, no Conv1D and no packed attention.
        OSError: a file cannot be read. Whatever is raised, the model is unchanged.
    """
    folder = Path(directory)
    config = read_config(_file(folder, CONFIG_NAME))
    weights = _weights(folder)
    modules = dict(model.named_modules())
    factors = _factors(_read(weights), modules, config.kind == ADALORA, weights)
    _check_complete(modules, factors, config, weights)
    updates: dict[str, Update] = {}
    for name, module_factors in factors.items():
        if not _is_nothing_at_out_proj(modules, name, module_factors, weights):
            updates |= _placed(modules, name, _update(name, module_factors, config, weights), weights)
    return install(model, updates, str(folder))


def _file(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} holds no {name}; give a directory that PEFT's save_pretrained wrote.")
    return folder / name


def _weights(folder: Path) -> Path:
    if (folder / _PICKLE).exists() and not (folder / WEIGHTS_NAME).exists():
        raise ValueError(
            f"{folder / _PICKLE} is a pickle, which may run code when it is opened, and is not read. Load it with PEFT where "
            f"you trust it, and save_pretrained it again: that writes {WEIGHTS_NAME}."
        )
    return _file(folder, WEIGHTS_NAME)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}). Restore it from a copy.") from error


def _factors(
    tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module], ada: bool, path: Path
) -> dict[str, dict[str, Tensor]]:
    """lora_A, lora_B and lora_E by name of the module, as "A", "B" and "E"."""
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        ending = next((ending for ending in _ENDINGS[ada] if key.endswith(ending)), None)
        if ending is None or not key.startswith(_PREFIX):
            unknown.append(key)
            continue
        name = key.removeprefix(_PREFIX).removesuffix(ending)
        if name not in modules:
            name = name.replace(".base_layer", "")  # PEFT's own, where one wrapper lies within another
        factor = found.setdefault(name, {})
        if _ENDINGS[ada][ending] in factor:
            raise ValueError(f"{path} holds two updates of {name}, of which one at most can be adapted here. {MERGE}")
        factor[_ENDINGS[ada][ending]] = tensor
    if unknown:
        raise ValueError(
            f"{path} holds {some(sorted(unknown))}; {' and '.join(_ENDINGS[ada])} of modules below {_PREFIX!r} are "
            f"accepted. {MERGE}"
        )
    needed = set(_ENDINGS[ada].values())
    lacking = sorted(f"lora_{letter} of {name}" for name, factor in found.items() for letter in needed - set(factor))
    if lacking:
        raise ValueError(f"{path} is incomplete: it lacks {some(lacking)}. Restore it from a copy, or save it again.")
    return found


def _check_complete(
    modules: Mapping[str, nn.Module], found: Mapping[str, object], config: PeftConfig, path: Path
) -> None:
    """PEFT saves every adapter that its configuration asks for: fewer are another adapter's, or another model's."""
    if config.some_layers:
        return
    hosts = {
        name: "in_proj_weight" if hasattr(module, "in_proj_weight") else "weight"
        for name, module in modules.items()
        if isinstance(module, (nn.Linear, _PackedAttention)) or is_attention(module) or is_conv1d(module)
    }
    lacking = [name for name, weight in hosts.items() if name not in found and config.names(name, weight)]
    if lacking:
        raise ValueError(
            f"{path} holds no update of {some(lacking)}, which {config.path.name} asks for. Restore both files of one "
            "adapter, or give the model that it was trained on."
        )


def _update(name: str, factors: Mapping[str, Tensor], config: PeftConfig, path: Path) -> Update:
    lora_a, lora_b = factors["A"], factors["B"]
    rank = lora_a.shape[0] if lora_a.dim() == 2 else -1
    if lora_b.dim() != 2 or lora_b.shape[1] != rank or ("E" in factors and list(factors["E"].shape) != [rank, 1]):
        shapes = ", ".join(f"lora_{letter} {list(factor.shape)}" for letter, factor in sorted(factors.items()))
        raise ValueError(
            f"{path}: {name} has {shapes}; [R, K], [N, R] and, of AdaLoRA, [R, 1] are accepted, as of a linear layer."
        )
    if rank != config.ranks(name):
        raise ValueError(
            f"{path}: {name} has rank {rank}, and {config.path.name} says {config.ranks(name)}. Restore both files of one "
            "adapter."
        )
    gate = factors["E"].flatten() if "E" in factors else torch.ones(rank)
    return Update(lora_a, lora_b, gate, config.scaling(name, rank) if rank else 1.0)


def _is_nothing_at_out_proj(
    modules: Mapping[str, nn.Module], name: str, factors: Mapping[str, Tensor], path: Path
) -> bool:
    """Whether this is the update of zero that comes with PEFT's adapter of an nn.MultiheadAttention; another is refused."""
    parent, _, last = name.rpartition(".")
    if last != "out_proj" or not isinstance(
        modules.get(parent), (nn.MultiheadAttention, FusedRankLoRAMultiheadAttention)
    ):
        return False
    if factors["B"].count_nonzero():
        raise ValueError(
            f"{path} updates {name}, of an nn.MultiheadAttention: PEFT (0.21) adds that twice, later versions may add it "
            f"once, and the file does not tell which it was trained with. {MERGE}"
        )
    return True


def _placed(modules: Mapping[str, nn.Module], name: str, update: Update, path: Path) -> dict[str, Update]:
    """The updates of our adapters that make up the one of a module."""
    module = modules.get(name)
    packed = isinstance(module, _PackedAttention) or is_attention(module)
    return _split(name, update, path) if packed else {name: update}


def _split(name: str, update: Update, path: Path) -> dict[str, Update]:
    """q, k and v of an update of in_proj_weight; columns of lora_B that are zero in a part's rows belong to another part."""
    if update.lora_b.shape[0] % 3:
        raise ValueError(
            f"{path}: lora_B of {name} has {update.lora_b.shape[0]} rows; those of q, k and v, three times as many as the "
            "attention is wide, are accepted."
        )
    parts = {}
    for part, rows in zip(QKV, update.lora_b.chunk(3)):
        keep = rows.count_nonzero(dim=0).nonzero().flatten()
        if keep.numel():
            parts[f"{name}.{part}"] = Update(
                update.lora_a.index_select(0, keep), rows.index_select(1, keep), update.gate[keep], update.scaling
            )
    return parts
