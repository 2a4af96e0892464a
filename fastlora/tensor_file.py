"""A safetensors file, read in one go."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors.torch import load
from torch import Tensor


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of one and the same file; the tensors are no part of it and begin where torch's own do.

    `safetensors.safe_open` opens a file twice, for its header and for its tensors: where somebody replaces it in between,
    they are of two files.

    Raises:
        SafetensorError: it is no such file, or not whole.
        OSError: it cannot be read.
    """
    content = Path(path).read_bytes()
    tensors = load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header.get("__metadata__", {}), {name: tensor.clone() for name, tensor in tensors.items()}
