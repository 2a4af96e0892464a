"""Files that are whole or not there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file in one step: whoever looks sees the old content or the new one, also after a crash.

    A process that is killed may leave a hidden file `.NAME.*` behind, beside a whole one or none.

    Raises:
        OSError: the folder is missing, read-only or full; what was at `path` is whole.
    """
    target = Path(path)
    try:
        _write_beside_and_rename(target, content)
    except OSError as error:
        # of a write that fails the system names no file, and of others the temporary one
        raise type(error)(
            f"{target} was not written ({error.strerror or error}); what was there before is whole. "
            f"Make sure that {target.absolute().parent} exists, can be written and has room, then write again."
        ) from error


def _write_beside_and_rename(target: Path, content: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
