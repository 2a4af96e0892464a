"""MATLAB files of version 5 (also 6 and 7): numbers, texts, cells and structures, as the data sets' label files hold them.

scipy's reader ends the process at three of a hundred damaged files, by a read beyond its memory; here every length is
compared with the bytes that are there. The format is that of "MAT-File Format", The MathWorks, level 5.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_TEXTS = {1: "latin1", 2: "latin1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
_MATRIX, _COMPRESSED = 14, 15
_CELL, _STRUCT, _CHAR, _NUMERIC = 1, 2, 4, range(6, 16)
_DEEPEST, _LONGEST = 8, 1 << 28  # cells within cells; bytes of a variable, unpacked


class MatlabError(ValueError):
    """It is no such file, is damaged, or holds what the label files do not."""


def parse_matlab(content: bytes) -> dict[str, Any]:
    """Variables by name: arrays without axes of length 1, a text as str, a structure as an array with fields.

    Raises:
        MatlabError: the bytes are something else, or not whole.
    """
    orders = {b"IM": "<", b"MI": ">"}
    if len(content) < 128 or content[126:128] not in orders:
        raise MatlabError("it is no MATLAB file of version 5")
    order, found = orders[content[126:128]], {}
    for kind, data in _elements(memoryview(content)[128:], order):
        if kind == _COMPRESSED:
            kind, data = next(_elements(_unpacked(data), order), (0, data))
        if kind == _MATRIX:
            name, value = _matrix(data, order, 0)
            found[name] = value
    return found


def _elements(content: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """Type and data of each element; a small one has both in eight bytes."""
    at = 0
    while at < len(content):
        if len(content) - at < 8:
            raise MatlabError("it ends within an element")
        kind, size = map(int, np.frombuffer(content, f"{order}u4", 2, at))
        small = kind >> 16
        begin, size, kind = (at + 4, small, kind & 0xFFFF) if small else (at + 8, size, kind)
        if size > (4 if small else len(content) - begin):
            raise MatlabError(f"an element of {size} bytes goes beyond its end")
        yield kind, content[begin : begin + size]
        at = at + 8 if small else begin + size + (0 if kind == _COMPRESSED else -size % 8)


def _unpacked(data: memoryview) -> memoryview:
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(data, _LONGEST)
    except zlib.error as error:
        raise MatlabError(f"a variable cannot be unpacked: {error}") from None
    if not stream.eof:
        raise MatlabError("a packed variable is not whole, or of more than 256 MB")
    return memoryview(content)


def _matrix(content: memoryview, order: str, depth: int) -> tuple[str, Any]:
    if depth > _DEEPEST:
        raise MatlabError("it has cells within cells within cells")
    if not len(content):  # how MATLAB writes an empty entry of a cell
        return "", np.empty(0)
    parts = _elements(content, order)
    flags, dims, name = (_next(parts) for _ in range(3))
    if len(flags[1]) < 4:
        raise MatlabError("a variable does not tell its class")
    shape = tuple(int(n) for n in _numbers(*dims, order))
    count = math.prod(shape)
    if len(shape) < 2 or min(shape) < 0 or count > len(content):  # an entry takes a byte at least
        raise MatlabError(f"a variable has shape {list(shape)}")
    kind = int(np.frombuffer(flags[1], f"{order}u4", 1)[0]) & 0xFF
    label = bytes(name[1]).decode("latin1")
    if kind in _NUMERIC:
        return label, _squeezed(_shaped(_numbers(*_next(parts), order), shape))
    if kind == _CHAR:
        return label, _text(*_next(parts), order, shape)
    if kind == _CELL:
        return label, _squeezed(_shaped(_objects(_entries(parts, count, order, depth)), shape))
    if kind == _STRUCT:
        return label, _squeezed(_structure(parts, shape, order, depth))
    raise MatlabError(f"a variable is of class {kind}; numbers, texts, cells and structures are read")


def _next(parts: Iterator[tuple[int, memoryview]]) -> tuple[int, memoryview]:
    part = next(parts, None)
    if part is None:
        raise MatlabError("a variable is not whole")
    return part


def _numbers(kind: int, data: memoryview, order: str) -> np.ndarray:
    if kind not in _NUMBERS or len(data) % np.dtype(_NUMBERS[kind]).itemsize:
        raise MatlabError(f"numbers are of type {kind}, or not whole")
    return np.frombuffer(data, order + _NUMBERS[kind])


def _text(kind: int, data: memoryview, order: str, shape: tuple[int, ...]) -> Any:
    """A row as str; several rows as an array of them."""
    if kind not in _TEXTS:
        raise MatlabError(f"a text is of type {kind}")
    little = {"<": "-le", ">": "-be"}[order]
    form = _TEXTS[kind] + (little if _TEXTS[kind] in ("utf-16", "utf-32") else "")
    try:
        letters = list(bytes(data).decode(form))
    except UnicodeDecodeError as error:
        raise MatlabError(f"a text cannot be read: {error}") from None
    if len(shape) != 2 or not letters:
        return ""
    rows = ["".join(row) for row in _shaped(_objects(letters), shape)]
    return rows[0] if len(rows) == 1 else np.array(rows)


def _entries(parts: Iterator[tuple[int, memoryview]], count: int, order: str, depth: int) -> list[Any]:
    found = []
    for _ in range(count):
        kind, data = _next(parts)
        if kind != _MATRIX:
            raise MatlabError(f"an entry is of type {kind}, and no variable")
        found.append(_matrix(data, order, depth + 1)[1])
    return found


def _structure(parts: Iterator[tuple[int, memoryview]], shape: tuple[int, ...], order: str, depth: int) -> np.ndarray:
    """All fields of the first entry, then of the next."""
    length, names = _numbers(*_next(parts), order), bytes(_next(parts)[1])
    size = int(length[0]) if length.size else 0
    if size < 1 or len(names) % size:
        raise MatlabError("a structure does not tell the names of its fields")
    fields = [names[at : at + size].split(b"\0")[0].decode("latin1") for at in range(0, len(names), size)]
    if not all(fields) or len(set(fields)) < len(fields):
        raise MatlabError(f"a structure has fields {fields}")
    found = np.empty(math.prod(shape), [(field, object) for field in fields])
    values = _entries(parts, found.size * len(fields), order, depth)
    for i in range(found.size):
        found[i] = tuple(values[i * len(fields) : (i + 1) * len(fields)])
    return _shaped(found, shape)


def _objects(values: list[Any]) -> np.ndarray:
    """Of any kind; numpy would look into them."""
    found = np.empty(len(values), object)
    for i, value in enumerate(values):
        found[i] = value
    return found


def _shaped(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if values.size != math.prod(shape):
        raise MatlabError(f"a variable of shape {list(shape)} has {values.size} entries")
    return values.reshape(shape, order="F")


def _squeezed(values: np.ndarray) -> Any:
    """Without axes of length 1, as scipy's squeeze_me: one number or entry is itself, nothing has one axis."""
    values = values.squeeze() if values.size else np.empty(0, values.dtype)
    return values.item() if not values.shape and values.dtype.names is None else values
