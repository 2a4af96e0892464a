"""Checkpoints that several processes write together (torch.distributed.checkpoint), of models whose ranks were dropped.

torch reads such a checkpoint into tensors that have its shapes already, shard by shard. An adapter of another rank gets
that of the checkpoint first:

    fastlora.inject(model, rank=16)
    adopt_ranks(model, path)
    ...  # fully_shard, the optimizer
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    torch.distributed.checkpoint.load(state, checkpoint_id=path)
"""

from __future__ import annotations

import os

import torch
from torch import nn

from fastlora.adapt import adapters

_TENSORS = ("lora_a", "lora_b", "gate")


def adopt_ranks(model: nn.Module, path: str | os.PathLike[str], prefix: str = "model.") -> dict[str, int]:
    """Give every adapter the rank that it has in a checkpoint; its values are zeros until that is loaded.

    Reads the checkpoint's list of tensors alone, which torch writes as a pickle: take it from where you trust.

    Args:
        model: with adapters wherever the checkpoint has them, not sharded yet. An optimizer over it is to be made
            afterwards.
        path: directory that `torch.distributed.checkpoint.save` has written.
        prefix: what stands before the model's keys: "model." for {"model": get_model_state_dict(model)}.
    Returns:
        Adapter name -> rank.
    Raises:
        ValueError: no adapters, one that the checkpoint does not have or has in other widths, one that is sharded and
            has another rank, or no such checkpoint; no adapter has changed.
    """
    found = dict(adapters(model))
    if not found:
        raise ValueError(f"{type(model).__name__} has no adapters; call fastlora.inject(model, rank=...) first.")
    sizes = _sizes(path)
    stored = {}
    for name, adapter in found.items():
        keys = [f"{prefix}{name}.{key}" for key in _TENSORS]
        missing = [key for key in keys if key not in sizes]
        if missing:
            raise ValueError(
                f"{path} has no {missing[0]}; it has {len(sizes)} entries, as {next(iter(sizes), 'none')}. Inject where the "
                "saved model has adapters, and give the prefix of its keys."
            )
        r = sizes[keys[2]][0] if len(sizes[keys[2]]) == 1 else -1
        wanted = [(r, adapter.in_features), (adapter.out_features, r), (r,)]
        shapes = [tuple(sizes[key]) for key in keys]
        if shapes != wanted:
            raise ValueError(
                f"{path}: {name} has shapes {', '.join(map(str, shapes))} of lora_a, lora_b, gate; the model takes "
                f"(R, {adapter.in_features}), ({adapter.out_features}, R), (R,). Give the model that was saved."
            )
        if r != adapter.gate.numel():
            adapter.check_whole()
        stored[name] = shapes
    for name, shapes in stored.items():
        found[name]._adopt_rank(*(torch.empty(shape, device="meta") for shape in shapes))
    return {name: shapes[2][0] for name, shapes in stored.items()}


def _sizes(path: str | os.PathLike[str]) -> dict[str, torch.Size]:
    """Key -> shape of every tensor of a checkpoint."""
    from torch.distributed.checkpoint import FileSystemReader

    try:
        entries = FileSystemReader(path).read_metadata().state_dict_metadata
    except Exception as error:  # whatever the bytes lead pickle to
        raise ValueError(
            f"{path} is not a checkpoint of torch.distributed.checkpoint ({type(error).__name__}: {error}). Give the "
            "directory that its save has written."
        ) from error
    return {key: entry.size for key, entry in entries.items() if hasattr(entry, "size")}
