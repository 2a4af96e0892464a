"""Images that stay on disk until a batch asks for them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fastlora.continual.datasets.split import DataError, Images
from fastlora.continual.datasets.transforms import Transforms, fixed_generator


class Decoder:
    """The threads and the cache memory that the data sets of a run share.

    Args:
        workers: threads; None for one a core.
        cache_bytes: for decoded test images of all data sets together.
    """

    def __init__(self, workers: int | None = None, cache_bytes: int = 0) -> None:
        workers = workers or os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(workers, "decode") if workers > 1 else None
        self._left, self._lock = cache_bytes, threading.Lock()

    def map(self, function: Callable[..., Any], *items: Iterable[Any]) -> list[Any]:
        """Results in the order of the items; PIL decodes and resizes without holding the interpreter's lock."""
        return list(map(function, *items) if self._pool is None else self._pool.map(function, *items))

    def reserve(self, size: int) -> bool:
        """Whether `size` more bytes fit into the cache; they count as taken then."""
        with self._lock:
            fits = size <= self._left
            self._left -= size if fits else 0
        return fits


class LazyImages(Dataset):
    """Images of one side of a split: RGB, cropped at random for training, resized and cut for tests.

    Decoded test images are kept while the cache has room and never given up: an evaluation reads them all in the same
    order, and a cache of the newest would hold exactly those that come last again.

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

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.load([range(len(self))[index]])
        return images[0], int(labels[0])

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
            for height, width in self._decoder.map(self._size, before if generator else ()):
                self._transforms.draw(height, width, generator)
            decoded = self._decoder.map(self._decoded, indices)
            boxes = [
                self._transforms.draw(image.height, image.width, generator or fixed_generator(index))
                for index, image in zip(indices, decoded)
            ]
            pixels = self._decoder.map(self._transforms.cut, decoded, boxes)
        else:
            pixels = self._decoder.map(self._fitted, indices)
        return self._transforms.normalise(torch.stack(pixels)), self.labels[indices]

    def _decoded(self, index: int) -> Image.Image:
        return self._opened(index, lambda image: image.convert("RGB"))

    def _size(self, index: int) -> tuple[int, int]:
        """Height and width, from the header of the file."""
        return self._opened(index, lambda image: (image.height, image.width))

    def _opened(self, index: int, read: Callable[[Image.Image], Any]) -> Any:
        if self._pixels is not None:
            return read(Image.fromarray(np.asarray(self._pixels[index])))
        path = self.folder / self.files[index]
        try:
            with Image.open(path) as image:
                return read(image)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(
                f"{path} cannot be decoded ({error}). Replace it; --data.verify decode finds all such files beforehand."
            ) from error

    def _fitted(self, index: int) -> Tensor:
        kept = self._cached.get(index)
        if kept is None:
            kept = self._transforms.fitted(self._decoded(index))
            if self._decoder.reserve(kept.nbytes):
                self._cached[index] = kept
        return kept

    def __repr__(self) -> str:
        return f"LazyImages({len(self)} images in {self.folder})"
