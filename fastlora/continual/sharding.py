"""FSDP2 while a task trains: each process holds a share of the frozen weights of the towers' blocks.

torch's `fully_shard` gathers the weights of a block when it is run, forward and backward, and frees them afterwards. It
takes modules over for good, and a task's adapters come and go with modules of their own: so a twin of each tower, over
the same parameters, is what it takes, and the tower itself is back between tasks, when methods merge, and read weights
as they are.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fastlora
from fastlora.continual.distributed import World


@contextlib.contextmanager
def sharding(model: nn.Module, world: World, dtype: torch.dtype) -> Iterator[None]:
    """Within, of the frozen weights of the towers' blocks the device holds this process's shares, rounded to `dtype`.

    The whole weights wait in host memory, bit for bit, and come back from there without a word between the processes,
    whatever happened. Adapters stay whole, the same parameters, and it is not FSDP that averages their gradients.

    Raises:
        ValueError: the model has no block of open_clip's build.
    """
    towers = {name: module for name, module in model.named_modules() if hasattr(module, "resblocks")}
    if not towers:
        raise ValueError(
            f"parallel is fsdp, which shards the blocks of open_clip's towers, and {type(model).__name__} has none. Give "
            "--parallel ddp."
        )
    kept = {id(parameter) for parameter in fastlora.adapter_parameters(model)}
    frozen = [parameter for tower in towers.values() for parameter in tower.parameters() if id(parameter) not in kept]
    device, waiting = frozen[0].device, [(parameter, parameter.data.cpu()) for parameter in frozen]
    mesh = init_device_mesh(device.type, (world.size,))
    try:
        for name, tower in towers.items():
            model.set_submodule(name, _sharded(tower, kept, mesh, dtype))
        yield
    finally:
        for name, tower in towers.items():
            model.set_submodule(name, tower)
        for parameter, data in waiting:
            parameter.data = data.to(device)


def _sharded(tower: nn.Module, kept: set[int], mesh: DeviceMesh, dtype: torch.dtype) -> nn.Module:
    """A twin of `tower` with sharded blocks; the parameters of `tower` that are not in `kept` are empty then."""
    # what a copy is told to know already is shared, and not copied
    twin = copy.deepcopy(tower, {id(tensor): tensor for tensor in [*tower.parameters(), *tower.buffers()]})
    adapters = {parameter for parameter in twin.parameters() if id(parameter) in kept}
    blocks: Any = twin
    for block in [
        *blocks.resblocks,
        twin,
    ]:  # the tower last: it is the root, from which the next block is gathered early
        frozen = [parameter for parameter in block.parameters() if id(parameter) not in kept]
        frozen = [parameter for parameter in frozen if not isinstance(parameter, DTensor)]
        for parameter in frozen:
            parameter.data = parameter.data.to(dtype)
        fully_shard(block, mesh=mesh, ignored_params=adapters)
        for parameter in frozen:
            parameter.data = parameter.data.new_empty(0)
    return twin
