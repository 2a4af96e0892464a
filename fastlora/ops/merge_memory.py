"""The memory of a merge: strides, what shares an element with what, and what can be written."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

_MAPS = Path("/proc/self/maps")
# shared memory without a file of its own, as processes that share a model have it
_ANONYMOUS = ("/dev/shm/", "/memfd:", "/dev/zero", "/SYSV", "anon_inode:", "/dev/nvidia")

Named = tuple[str, Tensor]


def strides(matrix: Tensor) -> tuple[int, int]:
    """Strides; those of dimensions of size 1, which PyTorch leaves to chance, such that one of the two is 1."""
    (n, k), (row, col) = matrix.shape, matrix.stride()
    col = 1 if k == 1 else col
    return ((k if col == 1 else 1) if n == 1 else row), col


def residual_strides(residual: Tensor, by_rows: bool) -> tuple[int, int]:
    """`strides`, with the unit stride in the dimension where the weight has it, if the residual's size leaves a choice."""
    (n, k), (row, col) = residual.shape, residual.stride()
    if by_rows:
        return (k if n == 1 else row), (1 if k == 1 else col)
    return (1 if n == 1 else row), (n if k == 1 else col)


def check_disjoint(written: Sequence[Named]) -> None:
    """Raise when two of the tensors share an element: the result would depend on the order of the writes."""
    spans = sorted((*_span(tensor), i) for i, (_, tensor) in enumerate(written) if tensor.numel())
    for at, (_, end, i) in enumerate(spans):
        for start, _, j in spans[at + 1 :]:
            if start >= end:
                break
            (one, first), (two, second) = written[i], written[j]
            if first.device == second.device and _share(first, second):
                raise ValueError(
                    f"{one} and {two} share memory; the weights of one call must be apart. "
                    "If they are tied, merge one of them; if one is to receive two updates, merge them in two calls."
                )


def _span(weight: Tensor) -> tuple[int, int]:
    """First address and the one behind the last."""
    (n, k), (row, col) = weight.shape, strides(weight)
    return weight.data_ptr(), weight.data_ptr() + ((n - 1) * row + (k - 1) * col + 1) * weight.element_size()


def _share(one: Tensor, two: Tensor) -> bool:
    """Whether weights with overlapping spans share an element; side by side in one matrix they need not."""
    by_rows = [strides(tensor)[1] == 1 for tensor in (one, two)]
    if by_rows[0] != by_rows[1] or one.dtype != two.dtype:
        return True
    one, two = (one, two) if by_rows[0] else (one.t(), two.t())
    pitch = strides(one)[0]
    offset, rest = divmod(two.data_ptr() - one.data_ptr(), one.element_size())
    if rest or pitch != strides(two)[0]:
        return True
    # `two` starts at this column, counted from the first column of `one`, in rows of `pitch` elements.
    column = offset % pitch
    return column < one.shape[1] or column + two.shape[1] > pitch


def check_writable(written: Sequence[Named]) -> None:
    """Raise for memory that a write would crash on, or whose file a write would change.

    A read-only mapping (numpy.memmap with mode "r") kills the process at the first write; a mapping that is shared with
    a file changes the file, half-way if the process dies. Where the system does not tell (other than Linux), nothing is
    refused.
    """
    if not sys.platform.startswith("linux") or not _MAPS.is_file():
        return
    spans = [(*_span(tensor), name) for name, tensor in written if tensor.device.type == "cpu" and tensor.numel()]
    if not spans:
        return
    maps = [_mapping(line) for line in _MAPS.read_text(errors="replace").splitlines()]
    starts = [start for start, *_ in maps]
    for start, end, name in spans:
        for first, last, mode, path in maps[max(bisect_right(starts, start) - 1, 0) :]:
            if first >= end:
                break
            if last > start:
                _refuse(name, mode, path)


def _mapping(line: str) -> tuple[int, int, str, str]:
    addresses, mode, _, _, _, *path = line.split(maxsplit=5)
    start, end = addresses.split("-")
    return int(start, 16), int(end, 16), mode, path[0] if path else ""


def _refuse(name: str, mode: str, path: str) -> None:
    if "w" not in mode:
        raise ValueError(
            f"{name} lies in memory that is read-only ({path or 'no file'}); a merge writes in place. Merge into a clone."
        )
    if "s" in mode and path and not path.startswith(_ANONYMOUS):
        raise ValueError(
            f"{name} is mapped from {path} and shared with that file, which a merge would change in place. Merge into a "
            "clone, or map it privately (torch.load(..., mmap=True) does)."
        )
