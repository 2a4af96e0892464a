"""Label files of the published data sets: text, JSON, MATLAB, Python pickles and idx. What is missing is told by path."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import pickletools
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from fastlora.continual.datasets.matlab import MatlabError, parse_matlab
from fastlora.continual.datasets.split import DataError

_LONGEST = 1 << 28  # bytes of an idx file; MNIST's longest has 47 million


def read_lines(path: Path) -> list[str]:
    """Lines without the blank ones."""
    return [line.strip() for line in _text(path).splitlines() if line.strip()]


def read_json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except (ValueError, RecursionError) as error:  # the second: brackets within brackets
        raise DataError(f"{path} is not JSON ({error}). Download it again.") from None


def read_mat(path: Path) -> dict[str, Any]:
    """Variables of a MATLAB file, a list each."""
    _must_exist(path)
    try:
        return parse_matlab(path)
    except MatlabError as error:
        raise DataError(f"{path} is not a readable MATLAB file ({error}). Download it again.") from None


def read_pickle(path: Path) -> dict[str, Any]:
    """A pickle of CIFAR, which holds arrays, numbers and texts; anything else in it is refused."""
    _must_exist(path)
    try:
        content = path.read_bytes()
        _check_places(content)
        found = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(f"{path} is not a readable pickle of CIFAR ({error}). Download it again.") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} holds a {type(found).__name__}, and no pickle of CIFAR. Download it again.")
    return found


def read_idx(path: Path) -> np.ndarray:
    """uint8 array of an idx file of MNIST; `path`.gz is read where `path` is not there."""
    packed = path.with_name(f"{path.name}.gz")
    if not path.is_file() and packed.is_file():
        path = packed
    _must_exist(path)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read(_LONGEST)  # a small file may unpack to any number of bytes
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked ({error}). Download it again.") from None
    kind, axes = content[2:3], content[3] if len(content) > 3 else 0
    shape = tuple(np.frombuffer(content, ">i4", axes, 4)) if len(content) >= 4 + 4 * axes else ()
    if content[:2] != b"\0\0" or kind != b"\x08" or len(content) != 4 + 4 * axes + int(np.prod(shape)):
        raise DataError(f"{path} is not an idx file of bytes, or not whole. Download it again.")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def _check_places(content: bytes) -> None:
    """Raises UnpicklingError where a value is put at a place that so many bytes cannot have come to: the unpickler would
    make room for all before it, up to 64 GB."""
    for opcode, place, _ in pickletools.genops(content):
        if opcode.name == "LONG_BINPUT" and (place or 0) > len(content):
            raise pickle.UnpicklingError(f"it puts a value at place {place}")


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numpy arrays and nothing else: an unpickler that builds anything runs the code of whoever wrote the file."""

    _RECONSTRUCT = np.empty(0).__reduce__()[0]

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return self._RECONSTRUCT
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # how newer Pythons pickle bytes
            import codecs

            return codecs.encode
        raise pickle.UnpicklingError(f"it wants {module}.{name}")


def _text(path: Path) -> str:
    _must_exist(path)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text ({error}). Download it again.") from None


def _must_exist(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"{path} is missing")
