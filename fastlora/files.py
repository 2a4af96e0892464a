"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path

# what mkstemp makes of the prefix that _write_beside_and_rename gives it
_LEFTOVER = re.compile(r"\..+\.[a-z0-9_]{8}")


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file in one step: whoever looks sees the old content or the new one, also after a crash.

    A process that is killed may leave a hidden file `.NAME.*` behind, beside a whole one or none; `sweep` removes it.

    Raises:
        OSError: the folder is missing, read-only or full; what was at `path` is whole.
    """
    target = Path(path)
    try:
        _write_beside_and_rename(target, content)
    except OSError as error:
        raise _not_written(target, error) from error


def write_directory(path: str | os.PathLike[str], files: Mapping[str, bytes]) -> None:
    """Make a directory of files in one step: whoever looks sees all of them or none, also after a crash.

    A process that is killed may leave a hidden directory `.NAME.*` behind, beside a whole one or none.

    Args:
        path: a new directory, or an empty one.
        files: content by name.
    Raises:
        FileExistsError: something is at `path` already; it is whole.
        OSError: the parent is missing, read-only or full; nothing was written.
    """
    target = Path(os.path.realpath(path))
    _check_new(target)
    try:
        _fill_beside_and_rename(target, files)
    except OSError as error:
        raise _not_written(target, error) from error


def _check_new(path: Path) -> None:
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(
            f"{path} exists already, and is not overwritten. Give a new or an empty directory, or remove it first."
        )


def append_whole(file: FileIO, content: bytes) -> None:
    """Append to an unbuffered file opened with mode "ab": all of `content`, or nothing of it where that fails.

    Raises:
        OSError: there is no room; the file is as it was.
    """
    length = os.fstat(file.fileno()).st_size
    try:
        while content:
            content = content[file.write(content) :]
    except OSError as error:
        file.truncate(length)
        raise _not_written(Path(file.name), error) from error


def sweep(folder: Path) -> None:
    """Remove the hidden files that killed writers left in `folder`."""
    for path in folder.glob(".*"):
        if is_leftover(path.name) and path.is_file():
            path.unlink()


def is_leftover(name: str) -> bool:
    """Whether a writer that was killed may have left a file of this name."""
    return _LEFTOVER.fullmatch(name) is not None


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Nobody else who asks for it is in `folder` meanwhile; made where it is not there, and gone again if left empty.

    Raises:
        RuntimeError: another process, or another thread of this one, is.
        OSError: the folder cannot be made or read.
    """
    made = not folder.exists()
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)  # the lock goes with it, also where the process is killed
        if made:
            with contextlib.suppress(OSError):  # it has files now
                folder.rmdir()


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(
            f"{folder} is in use: another process writes there at this moment. Give each process a directory of its own, "
            "or write again when the other is done."
        ) from None
    except OSError:
        pass  # a file system without locks


def _not_written(target: Path, error: OSError) -> OSError:
    # of a write that fails the system names no file, and of others the temporary one
    return type(error)(
        f"{target} was not written ({error.strerror or error}); what was there before is whole. "
        f"Make sure that {target.absolute().parent} exists, can be written and has room, then write again."
    )


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
    _keep_name(target.parent)


def _fill_beside_and_rename(target: Path, files: Mapping[str, bytes]) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for name, content in files.items():
            with open(temporary / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        os.chmod(temporary, 0o755)  # mkdtemp makes directories that only their owner can read
        _keep_name(temporary)
        os.rename(temporary, target)  # over nothing or an empty directory; it fails where another writer was first
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _keep_name(target.parent)


def _keep_name(folder: Path) -> None:
    """The new name survives a loss of power from here on, so that a later file never outlives an earlier one."""
    with contextlib.suppress(OSError):  # a file system that cannot: the file itself is safe, and whole
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
