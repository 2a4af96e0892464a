"""Reference data of the demo: pictures and captions of the pretraining world that belong to no task.

For methods that hold a model to what it knew (ZSCL). They have random streams of their own, so that no task and no test
set depends on them, and the pictures are rendered when one is first asked for: methods without use for them pay nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from fastlora.continual.demo.captions import caption
from fastlora.continual.demo.model import normalise
from fastlora.continual.demo.world import Scene, render, sample_scene
from fastlora.continual.stream import Reference

IMAGES = 512
TEXTS = 512


class Rendered(Dataset[tuple[torch.Tensor, int]]):
    """Pictures of scenes, all rendered at the first access; the label of each is 0.

    Args:
        scenes: what to show.
        seed: of the stream that every choice left open by a scene is drawn from.
    """

    def __init__(self, scenes: Sequence[Scene], seed: Sequence[int]) -> None:
        self._scenes, self._seed = tuple(scenes), tuple(seed)
        self._images: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if self._images is None:
            self._images = normalise(render(self._scenes, _generator(*self._seed)))
        return self._images[index], 0


def demo_reference() -> Reference:
    """512 pictures and 512 captions of other scenes, the same for every seed: what the model was pretrained on, anew."""
    scenes = {kind: _generator(*_key(kind, 0)) for kind in ("images", "texts")}
    pictures = [sample_scene(scenes["images"]) for _ in range(IMAGES)]
    texts = tuple(caption(sample_scene(scenes["texts"]), scenes["texts"]) for _ in range(TEXTS))
    return Reference(Rendered(pictures, _key("images", 1)), texts)


def _key(kind: str, part: int) -> tuple[int, ...]:
    return zlib.crc32(b"reference " + kind.encode()), part


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
