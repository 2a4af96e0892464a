"""The demo world: what a picture may show, and how it is rendered (32 px RGB).

A Scene says what is in the picture (it is all a caption may talk about); a Look says how the picture is taken. The
pretraining world uses the plain Look; each task of the benchmark is a Look that pretraining never saw.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from fastlora.continual.demo import masks

SIZE = masks.SIZE
SHAPES = tuple(masks.POLYGONS)
TEXTURES = tuple(masks.TEXTURES)
DIGITS = tuple("0123456789")
LETTERS = tuple("BEFHKMRTWY")  # no A (the article) and none that a digit or a shape resembles
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 35),
    "orange": (250, 140, 20),
    "yellow": (245, 230, 50),
    "green": (40, 180, 60),
    "cyan": (60, 220, 225),
    "blue": (50, 80, 240),
    "purple": (150, 50, 200),
    "pink": (250, 140, 190),
    "brown": (140, 85, 45),
    "white": (245, 245, 245),
}
# name -> centre of a single object, in pixels
POSITIONS: dict[str, tuple[float, float]] = {
    "center": (16, 16),
    "left": (10, 16),
    "right": (22, 16),
    "top": (16, 10),
    "bottom": (16, 22),
}
MAX_COUNT = 4
_SLOTS = np.array([(-7.5, -7.5), (7.5, -7.5), (-7.5, 7.5), (7.5, 7.5)])  # where several objects stand, from the middle
_DARK = 135  # mean of the channels below which a colour stands out on a bright ground
_MIDDLE = np.array([SIZE / 2, SIZE / 2])


@dataclasses.dataclass(frozen=True)
class Scene:
    """Contents of a picture.

    Args:
        kind: "shape", "digit", "letter", or "swatch" (a texture that fills the frame).
        name: one of SHAPES, DIGITS, LETTERS or TEXTURES.
        colour, texture: keys of COLOURS and TEXTURES; glyphs are always "plain".
        position: a key of POSITIONS for a single object, None when there are several.
        count: 1 to MAX_COUNT; glyphs come alone.
    """

    kind: str
    name: str
    colour: str
    texture: str = "plain"
    position: str | None = "center"
    count: int = 1


@dataclasses.dataclass(frozen=True)
class Look:
    """How a picture is taken; the defaults are the pretraining world.

    Args:
        turn: range of rotation in degrees (sign drawn at random); turns the arrangement of several objects as well.
        slant: range of the shear of glyphs (sign drawn at random).
        outline: draw the contour of shapes around a faint body.
        close_up: textures are enlarged and turned.
        cast: strength of a coloured light, 0 (none) to 1.
        inverted: negative of the picture.
    """

    turn: tuple[float, float] = (0.0, 12.0)
    slant: tuple[float, float] = (0.0, 0.1)
    outline: bool = False
    close_up: bool = False
    cast: float = 0.0
    inverted: bool = False


def pick(rng: np.random.Generator, names: Iterable[str]) -> str:
    """One of the names, each equally likely."""
    names = tuple(names)
    return names[rng.integers(len(names))]


def sample_scene(rng: np.random.Generator) -> Scene:
    """A scene of the pretraining world; of eight, 3 show one shape, 2 several, 1 a digit, 1 a letter, 1 a swatch."""
    colour, position = pick(rng, COLOURS), pick(rng, POSITIONS)
    draw = rng.random()
    if draw < 0.125:
        return Scene("digit", pick(rng, DIGITS), colour, position=position)
    if draw < 0.25:
        return Scene("letter", pick(rng, LETTERS), colour, position=position)
    shape, texture = pick(rng, SHAPES), pick(rng, TEXTURES)
    if draw < 0.375:
        return Scene("swatch", texture, colour, texture)
    if draw < 0.625:
        return Scene("shape", shape, colour, texture, None, int(rng.integers(2, MAX_COUNT + 1)))
    return Scene("shape", shape, colour, texture, position)


def _signed(rng: np.random.Generator, limits: tuple[float, float]) -> float:
    return float(rng.uniform(*limits) * rng.choice((-1.0, 1.0)))


def _position(scene: Scene) -> np.ndarray:
    assert scene.position is not None  # there is one object
    return np.array(POSITIONS[scene.position])


def _mask(scene: Scene, look: Look, rng: np.random.Generator) -> np.ndarray:
    if scene.kind == "swatch":
        return np.ones((SIZE, SIZE), np.float32)
    if scene.kind != "shape":
        centre = _position(scene) + rng.uniform(-1.0, 1.0, 2)
        matrix = masks.affine(_signed(rng, look.turn), _signed(rng, look.slant))
        return masks.glyph_mask(scene.name, tuple(centre), rng.uniform(17, 24), matrix, int(rng.integers(3)))
    if scene.count == 1:
        centres = _position(scene)[None] + rng.uniform(-1.0, 1.0, (1, 2))
        radius = rng.uniform(6.5, 12.0 if scene.position == "center" else 9.5)
        matrices = [masks.affine(_signed(rng, look.turn))]
    else:
        chosen = rng.permutation(len(_SLOTS))[: scene.count]
        whole = masks.affine(_signed(rng, look.turn))
        centres = (_SLOTS[chosen] + rng.uniform(-1.5, 1.5, (scene.count, 2))) @ whole + _MIDDLE
        radius = rng.uniform(4.5, 5.8)
        matrices = [whole @ masks.affine(_signed(rng, (0.0, 12.0))) for _ in range(scene.count)]
    return masks.shape_mask(scene.name, [tuple(c) for c in centres], radius, matrices, look.outline)


def _texture(scene: Scene, look: Look, rng: np.random.Generator) -> np.ndarray:
    if look.close_up:
        return masks.texture(scene.texture, rng.uniform(7.0, 12.0), _signed(rng, (0.0, 25.0)), rng)
    # small objects get a fine texture, or it could not be told
    return masks.texture(
        scene.texture, rng.uniform(4.0, 6.5 if scene.count == 1 else 4.5), _signed(rng, (0.0, 8.0)), rng
    )


def _ground(scenes: Sequence[Scene], rng: np.random.Generator) -> np.ndarray:
    """[n, 1, 1, 3] tinted greys on which the objects stand out: dark, or bright for two in five of the dark colours."""
    n = len(scenes)
    bright = np.array([np.mean(COLOURS[scene.colour]) < _DARK for scene in scenes]) & (rng.random(n) < 0.4)
    grey = np.where(bright, rng.uniform(170, 235, n), rng.uniform(10, 75, n))
    return grey[:, None, None, None] + rng.uniform(-12, 12, (n, 1, 1, 3))


def _light(n: int, strength: float, rng: np.random.Generator) -> np.ndarray:
    """[n, 1, 1, 3] factors: one channel stays, the others are dimmed by up to `strength`."""
    light = 1.0 - strength * rng.uniform(0.5, 1.0, (n, 3))
    light[np.arange(n), rng.integers(3, size=n)] = 1.0
    return light[:, None, None, :]


def render(scenes: Sequence[Scene], rng: np.random.Generator, look: Look | None = None) -> np.ndarray:
    """Pictures of the scenes.

    Args:
        scenes: what to show.
        rng: every choice that a scene leaves open (jitter, noise, background) is drawn from it.
        look: how to take the pictures; None for the pretraining world.
    Returns:
        uint8 [n, 32, 32, 3]. Same scenes, generator state and library versions give the same bytes.
    """
    look = look or Look()
    n = len(scenes)
    if n == 0:
        return np.zeros((0, SIZE, SIZE, 3), np.uint8)
    mask = np.stack([_mask(scene, look, rng) for scene in scenes])[..., None]
    pattern = np.stack([_texture(scene, look, rng) for scene in scenes])[..., None]
    colour = np.array([COLOURS[scene.colour] for scene in scenes], np.float32) + rng.normal(0, 12, (n, 3))
    body = colour[:, None, None, :] * (0.35 + 0.65 * pattern)
    pixels = _ground(scenes, rng) * (1 - mask) + body * mask
    pixels += rng.normal(0, 1, (n, SIZE, SIZE, 3)) * rng.uniform(4, 16, (n, 1, 1, 1))
    if look.cast:
        pixels *= _light(n, look.cast, rng)
    pixels = pixels.clip(0, 255).astype(np.uint8)
    return 255 - pixels if look.inverted else pixels
