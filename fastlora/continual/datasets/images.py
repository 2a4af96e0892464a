"""Images that stay on disk until a batch asks for them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fastlora.continual.datasets.disk_cache import DiskCache, entry_bytes
from fastlora.continual.datasets.split import DataError, Images
from fastlora.continual.datasets.transforms import Box, Transforms, fixed_generator

# formats whose header has the size that the decoded image has; a TIFF may be turned while it is decoded
_SIZE_IN_HEADER = ("JPEG", "MPO", "PNG", "WEBP")


class Decoder:
    """The threads and the caches that the data sets of a run share.

    Args:
        workers: threads; None for one a core.
        cache_bytes: memory for decoded test images of all data sets together.
        disk: keeps what has been prepared from run to run; None for nothing.
        crops: whether it keeps the random crops of training too.
    """

    def __init__(
        self, workers: int | None = None, cache_bytes: int = 0, disk: DiskCache | None = None, crops: bool = False
    ) -> None:
        workers = workers or os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(workers, "decode") if workers > 1 else None
        self._left, self._lock = cache_bytes, threading.Lock()
        self._disk, self._crops = disk, crops

    def map(self, function: Callable[..., Any], *items: Iterable[Any]) -> list[Any]:
        """Results in the order of the items; PIL decodes and resizes without holding the interpreter's lock."""
        return list(map(function, *items) if self._pool is None else self._pool.map(function, *items))

    def reserve(self, size: int) -> bool:
        """Whether `size` more bytes fit into the memory of the cache; they count as taken then."""
        with self._lock:
            fits = size <= self._left
            self._left -= size if fits else 0
        return fits

    def disk(self, training: bool) -> DiskCache | None:
        """Where images of one side of a split stay from run to run."""
        return self._disk if self._crops or not training else None


class _Opened(NamedTuple):
    """An image of which the header has been read, and the hash of its file where its pixels stay on disk."""

    image: Image.Image
    content: bytes | None


class LazyImages(Dataset[tuple[Tensor, int]]):
    """Images of one side of a split: RGB, cropped at random for training, resized and cut for tests.

    Decoded test images are kept while the memory has room and never given up: an evaluation reads them all in the same
    order, and a cache of the newest would hold exactly those that come last again. On disk an image is found by the
    content of its file, which is read and hashed at each use: another file in its place is another image.

    Args:
        folder: what the names in `images` are relative to.
        training: random crops.
    """

    def __init__(
        self, folder: Path, images: Images, transforms: Transforms, decoder: Decoder, *, training: bool
    ) -> None:
        self.folder, self.files, self.training = folder, images.names, training
        self.labels = torch.tensor(images.labels, dtype=torch.int64)
        self._pixels, self._transforms, self._decoder = images.pixels, transforms, decoder
        self._cached: dict[int, Tensor] = {}
        self._disk = decoder.disk(training) if self._pixels is None else None  # arrays need no decoder
        self._recipe = "" if self._disk is None else transforms.recipe()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.load([range(len(self))[index]])
        return images[0], int(labels[0])

    @property
    def disk_bytes(self) -> int:
        """What an image takes on disk beside its file, each random crop for itself; 0 where nothing is kept."""
        return 0 if self._disk is None else entry_bytes(*self._transforms.size)

    def load(
        self, indices: Sequence[int], generator: torch.Generator | None = None, part: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """A batch, or a part of it: images float32 [B, 3, H, W] and labels [B].

        Args:
            generator: of the random crops, drawn in the order of the batch; without one an image always has the same.
            part: of the batch; of the images before it the sizes alone are read, which their draws depend on.
        Raises:
            ValueError: a file cannot be decoded; it is named.
        """
        before, indices = ([int(index) for index in indices[rows]] for rows in (slice(part.start or 0), part))
        if self.training:
            if generator is not None:
                for height, width in self._decoder.map(self._size, before):
                    self._transforms.draw(height, width, generator)
            opened = self._decoder.map(self._opened, indices)
            boxes = [
                self._transforms.draw(image.height, image.width, generator or fixed_generator(index))
                for index, (image, _) in zip(indices, opened)
            ]
            pixels = self._decoder.map(self._prepared, indices, opened, boxes)
        else:
            pixels = self._decoder.map(self._fitted, indices)
        return self._transforms.normalise(torch.stack(pixels)), self.labels[indices]

    def _size(self, index: int) -> tuple[int, int]:
        """Height and width."""
        if self._pixels is not None:
            height, width = np.asarray(self._pixels[index]).shape[:2]
            return height, width
        with self._decoding(index), Image.open(self.folder / self.files[index]) as image:
            if image.format not in _SIZE_IN_HEADER:
                image.load()
            return image.height, image.width

    def _fitted(self, index: int) -> Tensor:
        kept = self._cached.get(index)
        if kept is None:
            kept = self._prepared(index, self._opened(index))
            if self._decoder.reserve(kept.nbytes):
                self._cached[index] = kept
        return kept

    def _opened(self, index: int) -> _Opened:
        if self._pixels is not None:
            return _Opened(Image.fromarray(np.asarray(self._pixels[index])), None)
        with self._decoding(index):
            content = (self.folder / self.files[index]).read_bytes()
            image = Image.open(io.BytesIO(content))
            if image.format not in _SIZE_IN_HEADER:
                image.load()
        return _Opened(image, None if self._disk is None else hashlib.sha256(content).digest())

    def _prepared(self, index: int, opened: _Opened, box: Box | None = None) -> Tensor:
        """uint8 [3, H, W]: the box of a training image, or a test image; from disk where they were prepared before."""
        key, kept = b"", None
        if self._disk is not None:
            assert opened.content is not None
            key = hashlib.sha256(f"{self._recipe}\n{box}\n".encode() + opened.content).digest()
            kept = self._disk.get(key)
        if kept is None:
            with self._decoding(index):
                image = opened.image.convert("RGB")
            opened.image.close()  # or a batch would hold its pixels to the end
            kept = self._transforms.fitted(image) if box is None else self._transforms.cut(image, box)
            if self._disk is not None:
                self._disk.put(key, kept)
        return kept

    @contextlib.contextmanager
    def _decoding(self, index: int) -> Iterator[None]:
        path = self.folder / self.files[index]
        try:
            yield
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            text = re.sub(r"image file <_io.BytesIO object at \w+>", "the file", str(error))
            raise DataError(
                f"{path} cannot be decoded ({text}). Replace it; --data.verify decode finds all such files beforehand."
            ) from error

    def __repr__(self) -> str:
        return f"LazyImages({len(self)} images in {self.folder})"
