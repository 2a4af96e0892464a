"""The six tasks of the demo benchmark and its held-out set.

Each task shows known concepts in a way that pretraining never saw. Training shots depend on the seed, test sets never
do; every (seed, task, split) has a random stream of its own, so no task depends on which others were made before it.
Validation sets stand in for the test sets, the held-out one included, where options are chosen.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable

import numpy as np
import torch

from fastlora.continual.demo.captions import NUMBERS
from fastlora.continual.demo.model import normalise
from fastlora.continual.demo.reference import demo_reference
from fastlora.continual.demo.world import (
    COLOURS,
    DIGITS,
    LETTERS,
    MAX_COUNT,
    POSITIONS,
    SHAPES,
    SIZE,
    TEXTURES,
    Look,
    Scene,
    pick,
    render,
)
from fastlora.continual.stream import InMemoryImages, Task, TaskStream

# ten colours, five shapes twice: under a coloured light neither shape nor colour alone settles the class
CAST_PAIRS = (
    ("red", "circle"), ("cyan", "circle"), ("orange", "star"), ("blue", "star"), ("yellow", "square"),
    ("purple", "square"), ("green", "heart"), ("pink", "heart"), ("brown", "triangle"), ("white", "triangle"),
)  # fmt: skip


def _shape(name: str, rng: np.random.Generator) -> Scene:
    return Scene("shape", name, pick(rng, COLOURS), position=pick(rng, POSITIONS))


def _texture(name: str, rng: np.random.Generator) -> Scene:
    texture = name.split()[0]
    return Scene("swatch", texture, pick(rng, COLOURS), texture)


def _letter(name: str, rng: np.random.Generator) -> Scene:
    return Scene("letter", name.split()[-1], pick(rng, COLOURS), position=pick(rng, POSITIONS))


def _pair(name: str, rng: np.random.Generator) -> Scene:
    colour, shape = name.split()
    return Scene("shape", shape, colour, pick(rng, TEXTURES), pick(rng, POSITIONS))


def _number(name: str, rng: np.random.Generator) -> Scene:
    count = NUMBERS.index(name.split()[0]) + 1
    position = "center" if count == 1 else None
    return Scene("shape", pick(rng, SHAPES), pick(rng, COLOURS), pick(rng, TEXTURES), position, count)


def _anything(name: str, rng: np.random.Generator) -> Scene:
    first, last = name.split()
    if last == "pattern":
        return _texture(name, rng)
    if first in ("digit", "letter"):
        return Scene(first, last, pick(rng, COLOURS), position=pick(rng, POSITIONS))
    return _pair(name, rng)


@dataclasses.dataclass(frozen=True)
class _Rendered:
    """A task whose pictures are rendered: classes, prompts, the scene of a class, the look, test images per class."""

    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    scene: Callable[[str, np.random.Generator], Scene]
    look: Look
    per_class: int


SHAPE_TASK = _Rendered(
    "outlines", SHAPES, ("a picture of a {}.", "a drawing of a {}.", "a photo of a {}.", "a {}."),
    _shape, Look(outline=True, inverted=True), 20,
)  # fmt: skip
TEXTURE_TASK = _Rendered(
    "textures", tuple(f"{name} pattern" for name in TEXTURES),
    ("a {}.", "a picture of a {}.", "a photo of a {}.", "a drawing of a {}."),
    _texture, Look(close_up=True), 30,
)  # fmt: skip
LETTER_TASK = _Rendered(
    "letters", tuple(f"letter {name}" for name in LETTERS),
    ("a picture of the {}.", "a drawing of the {}.", "a photo of the {}.", "the {}."),
    _letter, Look(slant=(0.35, 0.7), inverted=True), 25,
)  # fmt: skip
CAST_TASK = _Rendered(
    "colour cast", tuple(" ".join(pair) for pair in CAST_PAIRS),
    ("a picture of a {}.", "a photo of a {}.", "a drawing of a {}.", "a {}."),
    _pair, Look(cast=0.9), 25,
)  # fmt: skip
COUNT_TASK = _Rendered(
    "counting", tuple(f"{name} object{'s' if index else ''}" for index, name in enumerate(NUMBERS[:MAX_COUNT])),
    ("a picture of {}.", "a photo of {}.", "a drawing of {}.", "{}."),
    _number, Look(turn=(15.0, 45.0)), 50,
)  # fmt: skip
HELD_OUT = _Rendered(
    "held-out",
    tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)
    + tuple(f"digit {name}" for name in DIGITS) + tuple(f"letter {name}" for name in LETTERS)
    + tuple(f"{name} pattern" for name in TEXTURES),
    ("a picture of a {}.", "a photo of a {}.", "a {}."),
    _anything, Look(), 3,
)  # fmt: skip
DIGIT_NAME = "digits"
DIGIT_TEMPLATES = ("a picture of the {}.", "a drawing of the {}.", "a photo of the {}.", "the {}.")
DIGIT_TEST_PER_CLASS = 30
_ENLARGED = 20  # from 8 px: about the size of the printed digits
_FRAME = (SIZE - _ENLARGED) // 2


SPLITS = ("test", "validation")


def _generator(name: str, seed: int | str) -> np.random.Generator:
    """The stream of a task's test or validation set, or that of its training shots with a seed."""
    kind = {"test": 0, "validation": 2}.get(seed, 1) if isinstance(seed, str) else 1
    key = (zlib.crc32(name.encode()), kind, 0 if isinstance(seed, str) else seed)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def _render(spec: _Rendered, per_class: int, seed: int | str) -> InMemoryImages:
    rng = _generator(spec.name, seed)
    scenes = [spec.scene(name, rng) for name in spec.classes for _ in range(per_class)]
    labels = torch.arange(len(spec.classes)).repeat_interleave(per_class)
    return InMemoryImages(normalise(render(scenes, rng, spec.look)), labels)


def _rendered_task(spec: _Rendered, shots: int, seed: int, split: str) -> Task:
    train = _render(spec, shots, seed) if shots else None
    return Task(spec.name, spec.classes, spec.templates, train, _render(spec, spec.per_class, split))


def _handwritten() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1797 scanned digits (8 px grey), enlarged on black: uint8 [n, 32, 32, 3], and their labels."""
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    grey = (data.images * (255 / 16)).astype(np.uint8)
    large = [
        np.asarray(Image.fromarray(image).resize((_ENLARGED, _ENLARGED), Image.Resampling.BICUBIC)) for image in grey
    ]
    framed = np.pad(np.stack(large), ((0, 0), (_FRAME, _FRAME), (_FRAME, _FRAME)))
    return np.repeat(framed[..., None], 3, axis=3), data.target


def _digit_task(shots: int, seed: int, split: str) -> Task:
    pixels, target = _handwritten()
    fixed, drawn = _generator(DIGIT_NAME, "test"), _generator(DIGIT_NAME, seed)
    test, train = [], []
    for digit in range(len(DIGITS)):
        order = fixed.permutation(np.flatnonzero(target == digit))
        if split == "validation":
            order = order[DIGIT_TEST_PER_CLASS:]  # none of the test images, neither to train on nor to choose by
        test.append(order[:DIGIT_TEST_PER_CLASS])
        train.append(drawn.choice(order[DIGIT_TEST_PER_CLASS:], shots, replace=False))

    def dataset(parts: list[np.ndarray]) -> InMemoryImages:
        index = np.concatenate(parts)
        return InMemoryImages(normalise(pixels[index]), torch.from_numpy(target[index].astype(np.int64)))

    classes = tuple(f"digit {name}" for name in DIGITS)
    return Task(DIGIT_NAME, classes, DIGIT_TEMPLATES, dataset(train), dataset(test))


def demo_stream(seed: int = 0, shots: int = 16, split: str = "test") -> TaskStream:
    """The embedded benchmark: six tasks with `shots` training images per class, and the held-out set.

    Args:
        seed: chooses the training images, not negative. Test sets are the same for every seed.
        shots: training images per class, 1 to 110.
        split: evaluate on the "test" sets, or on the "validation" sets, to choose options by.
    Returns:
        TaskStream of outlines (12 classes), digits (10), textures (6), letters (10), colour cast (10), counting (4);
        images are float32 [3, 32, 32]. The same arguments and library versions give the same bytes.
    Raises:
        ValueError: seed or shots out of range.
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be 0 or more. Give another seed.")
    if not 1 <= shots <= 110:
        raise ValueError(f"shots is {shots}; the handwritten digits allow 1 to 110 per class. Give fewer shots.")
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; accepted: {', '.join(SPLITS)}.")
    tasks = (
        _rendered_task(SHAPE_TASK, shots, seed, split),
        _digit_task(shots, seed, split),
        *(_rendered_task(spec, shots, seed, split) for spec in (TEXTURE_TASK, LETTER_TASK, CAST_TASK, COUNT_TASK)),
    )
    name = "demo" if split == "test" else f"demo_{split}"
    return TaskStream(name, tasks, _rendered_task(HELD_OUT, 0, seed, split), demo_reference())
