"""The device that a run is asked to train on, and how tensors get there."""

from __future__ import annotations

import torch
from torch import Tensor


def find_device(name: str) -> torch.device:
    """`name` as a device; "auto" is a GPU where torch sees one.

    Raises:
        ValueError: no device is called so. RuntimeError: torch sees no GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}; it must be auto or a torch device such as cpu or cuda:0.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device {name!r} was asked for but torch sees no GPU. Pass device=cpu, or auto.")
    return device


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on a GPU is made from pinned memory, so that the host does not wait for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
