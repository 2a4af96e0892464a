"""Checkpoints that several processes write together, and others read."""

from __future__ import annotations

import torch.distributed.checkpoint as dcp
from distributed.runs import adapted_clip, full_state, shard, step_by_hand
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import fastlora
from fastlora.continual.distributed import join
from fastlora.interop.dcp import adopt_ranks


def save(rank, path, whole_adapters):
    """Two steps, after the dead ranks were dropped where they may be; a checkpoint; what two further steps come to."""
    join("cpu")
    model = adapted_clip()
    if whole_adapters:
        fastlora.prune(model)
    shard(model, whole_adapters)
    optimizer = fastlora.optim.ProxAdamW(model, lr=1e-2)
    _steps(model, optimizer, (1, 2))
    dcp.save(_state(model, optimizer), checkpoint_id=path)
    _steps(model, optimizer, (3, 4))
    return full_state(model)


def load(rank, path, whole_adapters):
    """The two further steps in any number of processes, whose adapters were others until they loaded."""
    join("cpu")
    model = adapted_clip(scale=0.0)
    ranks = adopt_ranks(model, path)
    shard(model, whole_adapters)
    optimizer = fastlora.optim.ProxAdamW(model, lr=1e-2)
    state = _state(model, optimizer)
    dcp.load(state, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    _steps(model, optimizer, (3, 4))
    return set(ranks.values()), full_state(model)


def refuse(rank, path):
    """What adopt_ranks says to sharded adapters of another rank, which stay."""
    join("cpu")
    model = adapted_clip()
    shard(model, whole_adapters=False)
    try:
        adopt_ranks(model, path)
    except ValueError as error:
        return str(error), {len(gate) for key, gate in full_state(model).items() if key.endswith("gate")}


def _state(model, optimizer):
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))


def _steps(model, optimizer, seeds):
    for seed in seeds:
        step_by_hand(model, optimizer, seed, kappa=0.01)
