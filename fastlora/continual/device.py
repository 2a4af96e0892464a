"""The device that a run is asked to train on, and how tensors get there."""

from __future__ import annotations

import torch
from torch import Tensor


def find_device(name: str, local_rank: int | None = None) -> torch.device:
    """`name` as a device; "auto" is a GPU where torch sees one.

    Args:
        local_rank: of this process among those of its machine that train together; each takes a GPU of its own, which
            becomes torch's current one. None where it is alone.
    Raises:
        ValueError: no device is called so, or one GPU is named to several processes. RuntimeError: torch sees no GPU, or
            fewer than there are processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}; it must be auto or a torch device such as cpu or cuda:0.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device {name!r} was asked for but torch sees no GPU. Pass device=cpu, or auto.")
    if device.type != "cuda" or local_rank is None:
        return device
    if device.index is not None:
        raise ValueError(
            f"device is {name!r}, and several processes train together, each on the GPU of its LOCAL_RANK. Give "
            "--device cuda, and CUDA_VISIBLE_DEVICES to choose among the GPUs."
        )
    if local_rank >= torch.cuda.device_count():
        raise RuntimeError(
            f"this is process {local_rank} (from 0) of its machine, where torch sees {torch.cuda.device_count()} GPUs; "
            "each process needs one. Lower --nproc-per-node, or pass --device cpu."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on a GPU is made from pinned memory, so that the host does not wait for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
