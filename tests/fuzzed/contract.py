"""What a reader promises whatever the bytes: a result, or an error for users that names the file; soon, and in little memory."""

from __future__ import annotations

import contextlib
import io
import resource
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

SECONDS, MEGABYTES = 5.0, 512  # of one input, at most
ROOM = 3 << 30  # bytes of addresses beyond those in use: whoever asks for more is told that there is no memory


class Part(NamedTuple):
    """A file that a reader reads.

    path: below the folder. read: the folder. pack, unpack: what is mutated, and the file that it makes and comes from,
    where a length or a checksum would otherwise end every try at once. called: what names the file as well as its name.
    """

    path: str
    read: Callable[[Path], Any]
    pack: Callable[[bytes], bytes] = bytes
    unpack: Callable[[bytes], bytes] = bytes
    called: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reader:
    """One row of the table.

    Args:
        what: it reads, in words.
        make: writes a folder in which every file is good, with the library itself where it writes such files.
        parts: the files, of which the first byte of an input chooses one.
        also: errors that its docstring promises beside ValueError and OSError, which name a module and no file.
    """

    what: str
    make: Callable[[Path], Any]
    parts: tuple[Part, ...]
    also: tuple[type[Exception], ...] = ()


class Finding(NamedTuple):
    """A promise that was broken: how, where in the library, and all that is known."""

    kind: str
    place: str
    text: str


class Trial:
    """A reader at work in a folder. Counts what came of its inputs."""

    def __init__(self, reader: Reader, folder: Path) -> None:
        self.reader, self.folder = reader, folder
        self.inputs = self.errors = 0
        self.longest = 0.0
        reader.make(folder)
        self._whole = {part.path: (folder / part.path).read_bytes() for part in reader.parts}

    def seeds(self) -> list[bytes]:
        """An input for each part that gives the very file which was made."""
        return [bytes([i]) + part.unpack(self._whole[part.path]) for i, part in enumerate(self.reader.parts)]

    def read(self, given: bytes) -> Finding | None:
        """Whether one input breaks a promise."""
        part = self.reader.parts[given[0] % len(self.reader.parts) if given else 0]
        path = self.folder / part.path
        path.write_bytes(part.pack(given[1:]))
        memory, started = _peak(), time.perf_counter()
        try:
            found = self._error(part, path)
        finally:
            path.write_bytes(self._whole[part.path])
        seconds = time.perf_counter() - started
        self.inputs += 1
        self.longest = max(self.longest, seconds)
        if found is None and seconds > SECONDS:
            return Finding("slow", part.path, f"{seconds:.1f} s")
        if found is None and _peak() - memory > MEGABYTES:
            return Finding("memory", part.path, f"{_peak() - memory} MB")
        return found

    def _error(self, part: Part, path: Path) -> Finding | None:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            try:
                part.read(self.folder)
            except self.reader.also:
                self.errors += 1
            except (ValueError, OSError) as error:
                self.errors += 1
                if any(name in str(error) for name in (path.name, *part.called)):
                    return None
                return Finding("unnamed", _place(error), f"{type(error).__name__}: {error}")
            except Exception as error:
                return Finding(type(error).__name__, _place(error), "".join(traceback.format_exception(error))[-1500:])
        return None


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Whoever asks for gigabytes in here is told that there are none."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _peak() -> int:
    """Megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def _place(error: BaseException) -> str:
    """The innermost line of the library."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/fastlora/" in frame.filename] or frames
    return f"{own[-1].filename.rpartition('/fastlora/')[2]}:{own[-1].lineno}"
