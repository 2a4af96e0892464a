"""Pixels that stay on disk from run to run: a bounded directory of files whose names are hashes.

    CACHEDIR.TAG   tells whose directory it is; backup programs leave out what has this file
    lock           bytes of all entries, in digits; whoever changes them has this file locked
    ab/cdef...     an entry: its key, height and width, a checksum, the pixels

Any number of threads and processes may share a directory. An entry gets its name once it is written; one that a crash or
a bad disk damaged is told by its checksum, and made again. Files are read as numbers, never as objects, and no file that
the cache did not name is written or removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import struct
import tempfile
import threading
import warnings
import zlib
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastlora.continual.config import UsageError
from fastlora.files import is_leftover, write_atomically

TAG, LOCK = "CACHEDIR.TAG", "lock"
# bford.info/cachedir: the first line is that of every program
_MARK = b"Signature: 8a477f597d28d172789f06886806bc55\n# Prepared images of fastlora, format 1; may be deleted.\n"
_HEADER, _CHECKSUM = struct.Struct("<8s32sII"), struct.Struct("<I")  # format, key, height, width
_FORMAT = b"flpixel1"
_SHARD, _NAME = re.compile(r"[0-9a-f]{2}"), re.compile(r"[0-9a-f]{62}")
_FORGOTTEN = 3600 * 10**9  # ns after which nobody writes any more at a file that has no name yet
_SPARED = 0.9  # of the bound, when it is reached: to look at every entry for the sake of one would be slow


class DiskCache:
    """Pixels by key.

    Where it is full, what no run has used for longest is removed, but nothing that was used since this object was made:
    a run reads its images in turn, and the newest would drive out the one that is next. Then nothing more is added.
    Entries that are being written come on top of the bound, one for each thread.

    A directory that cannot be written or has no room left is warned of, once; what is in it is used all the same.

    Args:
        folder: the directory; it is made where its parent exists.
        limit: bytes of all entries together, whoever wrote them.
    Raises:
        UsageError: `folder` is no directory, holds other things, or has no parent.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._storing, self._guard = True, threading.Lock()
        self._start = 0  # mtime, in ns, of what this object has used is this or later
        try:
            self._open()
        except OSError as error:
            self._stop_storing(_obstacle(error))

    def get(self, key: bytes) -> Tensor | None:
        """uint8 [3, H, W] as they were put, or None where there are none, or none that are whole.

        Args:
            key: 32 bytes.
        """
        try:
            with open(self._path(key), "rb", buffering=0) as file:
                pixels = _read(file, key)
                if pixels is not None and os.fstat(file.fileno()).st_mtime_ns < self._start:
                    with contextlib.suppress(OSError):  # another user's; it counts as used when that one uses it
                        os.utime(file.fileno())
                return pixels
        except OSError:
            return None

    def put(self, key: bytes, pixels: Tensor) -> None:
        """Keep `pixels`, uint8 [3, H, W], under a key of 32 bytes, unless there is no room."""
        if not self._storing:
            return
        array = np.ascontiguousarray(pixels.numpy())
        header = _HEADER.pack(_FORMAT, key, *array.shape[1:])
        try:
            self._store(self._path(key), [header, _checksum(header, array), array])
        except OSError as error:
            self._stop_storing(_obstacle(error))

    def _path(self, key: bytes) -> Path:
        name = key.hex()
        return self.folder / name[:2] / name[2:]

    def _open(self) -> None:
        check_folder(self.folder)
        self.folder.mkdir(exist_ok=True)
        if not (self.folder / TAG).exists():
            write_atomically(self.folder / TAG, _MARK)
        os.close(os.open(self.folder / LOCK, os.O_CREAT | os.O_RDWR, 0o644))
        with self._locked() as lock:
            os.utime(lock.fileno())
            self._start = os.fstat(lock.fileno()).st_mtime_ns  # by the clock of the file system
            total = self._total(lock)
            _write_total(lock, self._remove_oldest() if total > self.limit else total)

    def _store(self, path: Path, parts: list[bytes | np.ndarray]) -> None:
        path.parent.mkdir(exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                for part in parts:
                    file.write(part if isinstance(part, bytes) else part.data)
            os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
            fits = self._admit(temporary, path, os.path.getsize(temporary))
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        if not fits:
            self._stop_storing(
                f"is full: its {self.limit / 1e9:g} GB hold what this run uses. Other images are decoded at every use. "
                "Raise data.cache_dir_gb to keep them too"
            )

    def _admit(self, temporary: str, path: Path, size: int) -> bool:
        """Give a file its name where it fits."""
        with self._locked() as lock:
            total = self._total(lock) - _removed(path)  # damaged, or put by another in the meantime
            if total + size > self.limit:
                total = self._remove_oldest(size)
            fits = total + size <= self.limit
            _write_total(lock, total + size if fits else total)  # a crash here counts too much, never too little
            if fits:
                os.replace(temporary, path)
        return fits

    @contextlib.contextmanager
    def _locked(self) -> Iterator[FileIO]:
        """Alone among threads, too: each has opened the file for itself."""
        with open(self.folder / LOCK, "r+b", buffering=0) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock

    def _total(self, lock: FileIO) -> int:
        try:
            return int(lock.read())
        except ValueError:  # new, or damaged
            return sum(size for _, size, _ in self._entries())

    def _remove_oldest(self, more: int = 0) -> int:
        """Make room for `more` bytes, and for others to come; bytes of what is left."""
        entries = sorted(self._entries())
        total = sum(size for _, size, _ in entries)
        for used, size, path in entries:
            if total + more <= _SPARED * self.limit or used >= self._start:
                break
            os.unlink(path)
            total -= size
        return total

    def _entries(self) -> Iterator[tuple[int, int, str]]:
        """(last use, bytes, path) of every entry. What killed writers left is removed."""
        for shard in os.scandir(self.folder):
            if not (_SHARD.fullmatch(shard.name) and shard.is_dir(follow_symlinks=False)):
                continue
            for entry in os.scandir(shard.path):
                with contextlib.suppress(FileNotFoundError):  # written to its end just now
                    if not entry.is_file(follow_symlinks=False):
                        continue
                    status = entry.stat(follow_symlinks=False)
                    if _NAME.fullmatch(entry.name):
                        yield status.st_mtime_ns, status.st_size, entry.path
                    elif _NAME.fullmatch(entry.name[1:63]) and is_leftover(entry.name):
                        if status.st_mtime_ns < self._start - _FORGOTTEN:
                            os.unlink(entry.path)

    def _stop_storing(self, why: str) -> None:
        with self._guard:
            told, self._storing = not self._storing, False
        if not told:
            warnings.warn(f"data.cache_dir {self.folder} {why}.", stacklevel=2)


def entry_bytes(height: int, width: int) -> int:
    """Size of an entry on disk."""
    return _HEADER.size + _CHECKSUM.size + 3 * height * width


def check_folder(folder: Path) -> None:
    """Raises UsageError unless `folder` is a cache, an empty directory, or can be made."""
    given = f"data.cache_dir is {str(folder)!r}"
    if not os.path.lexists(folder):
        if not folder.parent.is_dir():
            raise UsageError(f"{given}, and {str(folder.parent)!r} is no directory to make it in. Make that first.")
        return
    if not folder.is_dir():
        raise UsageError(f"{given}, which is no directory. Give one that is new or empty, or an earlier cache.")
    # listed before the tag is looked for: another process may be making the cache
    names = sorted(name for name in os.listdir(folder) if not is_leftover(name))
    if names and not _is_tagged(folder):
        listed = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise UsageError(
            f"{given}, which holds {listed} and is no cache of images. A cache removes files by itself: give a directory "
            "that is new or empty, or an earlier cache."
        )


def _is_tagged(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return (folder / TAG).read_bytes().startswith(_MARK)
    return False


def _obstacle(error: OSError) -> str:
    return (
        f"cannot be written ({error.strerror or error}). What is in it is used, and nothing is added to it: other images "
        "are decoded at every use. Make room or make it writable, or give another directory"
    )


def _read(file: FileIO, key: bytes) -> Tensor | None:
    header, checksum = file.read(_HEADER.size), file.read(_CHECKSUM.size)
    if len(checksum) < _CHECKSUM.size:
        return None
    form, own, height, width = _HEADER.unpack(header)
    rest = os.fstat(file.fileno()).st_size - len(header) - len(checksum)
    if form != _FORMAT or own != key or rest != 3 * height * width:
        return None
    pixels = np.empty((3, height, width), np.uint8)
    if file.readinto(pixels.data) != rest or _checksum(header, pixels) != checksum:
        return None
    return torch.from_numpy(pixels)


def _checksum(header: bytes, pixels: np.ndarray) -> bytes:
    return _CHECKSUM.pack(zlib.crc32(pixels.data, zlib.crc32(header)))


def _removed(path: Path) -> int:
    """Bytes of the file at `path`, which is there no longer."""
    try:
        size = path.stat(follow_symlinks=False).st_size
        path.unlink()
    except FileNotFoundError:
        return 0
    return size


def _write_total(lock: FileIO, total: int) -> None:
    os.pwrite(lock.fileno(), b"%020d\n" % max(total, 0), 0)
