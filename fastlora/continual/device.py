"""The device that a run is asked to train on."""

from __future__ import annotations

import torch


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
