"""Which options go with several processes, and with which way of sharing a run among them."""

from __future__ import annotations

from fastlora.continual.config import RunConfig
from fastlora.continual.distributed import World
from fastlora.continual.methods.base import Method


def check_parallel(config: RunConfig, method: Method, world: World) -> None:
    """Raises ValueError where several processes, or --parallel fsdp, cannot be had with the other options."""
    sharded, several, name = config.parallel == "fsdp", world.size > 1, config.method.name
    fsdp = "parallel is fsdp, and"
    obstacles = (
        (
            sharded and not several,
            f"{fsdp} this process is alone, with nobody to share weights with. Start with torchrun --nproc-per-node N -m "
            "fastlora train ..., or leave parallel out.",
        ),
        (
            several and config.cuda_graph,
            f"cuda_graph was asked for, and {world.size} processes exchange what a captured step would not wait for. "
            "Give --cuda_graph false.",
        ),
        (
            sharded and config.compile != "no",
            f"{fsdp} compile needs the whole weights of a block when it runs. Give --compile no, or --parallel ddp.",
        ),
        (
            sharded and not method.adapters_alone,
            f"{fsdp} {name} trains the weights, of which fsdp shares the frozen ones. Give --parallel ddp, or a method "
            "that trains adapters.",
        ),
        (
            sharded and method.beside_weights,
            f"{fsdp} what {name} trains is no part of the modules that are sharded. Give --parallel ddp.",
        ),
    )
    for stands, message in obstacles:
        if stands:
            raise ValueError(message)
