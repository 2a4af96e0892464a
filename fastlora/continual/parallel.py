"""Which options go with several processes, and with which way of sharing a run among them."""

from __future__ import annotations

from fastlora.continual.config import RunConfig
from fastlora.continual.distributed import World
from fastlora.continual.methods.base import Method


def check_parallel(config: RunConfig, method: Method, world: World) -> None:
    """Raises ValueError where several processes, or --parallel fsdp, cannot be had with the other options."""
    sharded, name = config.parallel == "fsdp", config.method.name
    several = world.size > 1
    obstacles = (
        (
            sharded and not several,
            "parallel is fsdp, and this process is alone, with nobody to share weights with",
            "torchrun --nproc-per-node N -m fastlora train ..., or leave parallel out",
        ),
        (
            several and config.cuda_graph,
            f"cuda_graph was asked for, and {world.size} processes exchange what a captured step would not wait for",
            "--cuda_graph false",
        ),
        (
            sharded and config.compile != "no",
            "parallel is fsdp, and compile needs the whole weights of a block when it runs",
            "--compile no, or --parallel ddp",
        ),
        (
            sharded and not method.adapters_alone,
            f"parallel is fsdp, which shards frozen weights, and {name} trains the weights themselves",
            "--parallel ddp, or a method that trains adapters",
        ),
        (
            sharded and method.beside_weights,
            f"parallel is fsdp, and what {name} trains is no part of the modules that are sharded",
            "--parallel ddp",
        ),
    )
    for stands, reason, instead in obstacles:
        if stands:
            raise ValueError(f"{reason}. Give {instead}.")
