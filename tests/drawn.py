"""What the property tests draw: strides, and names as a module or a task may have them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

LAYOUTS = ("contiguous", "transposed", "every other row", "every other column", "shifted", "repeated")
# letters of other scripts, quotes, line breaks, braces and what a path is made of; no dot, which torch keeps for itself
ODD = "aZ_0 é漢😀\"'\\/\n\t{}[]:,%$~\u202e\x7f"
names = st.text(ODD, min_size=1, max_size=12)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The values of a tensor of one or more axes behind other strides; what lies between them is NaN."""
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "shifted":
        return _put(torch.empty(tensor.numel() + 3, dtype=tensor.dtype)[3:].view(tensor.shape), tensor)
    if layout == "every other row":
        return _put(_gaps(tensor.shape[0] * 2, *tensor.shape[1:], dtype=tensor.dtype)[::2], tensor)
    if layout == "every other column":
        return _put(_gaps(*tensor.shape[:-1], tensor.shape[-1] * 2, dtype=tensor.dtype)[..., ::2], tensor)
    if layout == "repeated" and tensor.numel():
        return tensor[:1].expand(tensor.shape)  # other values, and a stride of 0
    return tensor.clone()


def _gaps(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def _put(view: Tensor, values: Tensor) -> Tensor:
    return view.copy_(values)
