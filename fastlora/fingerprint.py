"""What tensors hold, in few words: dtype, shape and a hash of the bytes of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor


def fingerprint(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> "dtype[shape] SHA-256" of each tensor; equal where every bit is, on whatever device.

    Reads every byte once, on one core at about 1.8 GB/s: 0.3 s for ViT-B/16 in float32, 8 s for 7 billion parameters in
    bfloat16. No sample of the bytes would do, since one changed row must show.

    Raises:
        ValueError: a tensor is on the meta device.
    """
    return {name: f"{kind(tensor)} {_sha256(name, tensor)}" for name, tensor in tensors.items()}


def kind(tensor: Tensor) -> str:
    """dtype and shape, as the first part of a fingerprint."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def checksum(header: Mapping[str, str], hashes: Mapping[str, str]) -> str:
    """SHA-256 of a file of tensors: of their fingerprint `hashes`, and of its header but for the entry "sha256"."""
    rest = {key: value for key, value in header.items() if key != "sha256"}
    return hashlib.sha256(json.dumps([rest, dict(hashes)], sort_keys=True).encode()).hexdigest()


def _sha256(name: str, tensor: Tensor) -> str:
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device and has no content; load its values first.")
    octets = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(octets.numpy().data).hexdigest()
