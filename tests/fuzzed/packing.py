"""Files taken apart and put together again, so that what is inside of them is mutated, too: lengths and checksums are made
right, as by somebody who knows the format."""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from fastlora.fingerprint import checksum, fingerprint


def without_length(whole: bytes) -> bytes:
    """A safetensors file from its header on."""
    return whole[8:]


def with_length(content: bytes) -> bytes:
    """A safetensors file whose header is the JSON that `content` begins with, or the whole of it."""
    text = content.decode("latin1")
    try:
        end = json.JSONDecoder().raw_decode(text)[1]
    except (ValueError, RecursionError):
        end = len(text)
    while text[end : end + 1] == " ":  # padding
        end += 1
    return end.to_bytes(8, "little") + content[:end] + content[end:]


def sealed(content: bytes) -> bytes:
    """`with_length`, and with the checksum that fits, where it is a safetensors file at all."""
    whole = with_length(content)
    try:
        tensors = load(whole)
        header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")]).get("__metadata__", {})
    except (SafetensorError, ValueError, TypeError, KeyError, RecursionError):
        return whole
    header["sha256"] = checksum(header, fingerprint(tensors))
    return save(tensors, header)


def pickle_of(archive: bytes) -> bytes:
    """The pickle in a file of torch.save."""
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        return file.read(_pickle_in(file))


def archive_with(pickled: bytes, archive: bytes) -> bytes:
    """That file with another pickle in it."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as file, zipfile.ZipFile(made, "w") as other:
        for name in file.namelist():
            other.writestr(name, pickled if name == _pickle_in(file) else file.read(name))
    return made.getvalue()


def _pickle_in(file: Any) -> str:
    return next(name for name in file.namelist() if name.endswith("data.pkl"))
