"""Memory that ends where a page ends and begins where one begins, beside pages that may not be touched."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor


def at_a_page(tensor: Tensor, keep: list[mmap.mmap], at: str = "end") -> Tensor:
    """A contiguous copy whose last element is the last one before a page that may not be touched, or whose first is the
    first one behind it.

    Args:
        keep: holds the memory; the copy is gone with it.
        at: "end" or "start".
    """
    page, size = mmap.PAGESIZE, tensor.numel() * tensor.element_size()
    room = (max(size, 1) + page - 1) // page * page
    memory = mmap.mmap(-1, room + 2 * page)
    keep.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (start, start + page + room):
        if ctypes.CDLL(None).mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) != 0:
            raise OSError("mprotect failed")
    if not tensor.numel():
        return tensor
    offset = page + (room - size if at == "end" else 0)
    whole = torch.frombuffer(memory, dtype=torch.uint8, count=page + room)
    return whole[offset : offset + size].view(tensor.dtype).view(tensor.shape).copy_(tensor)
