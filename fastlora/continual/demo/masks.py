"""Coverage masks of the demo world's shapes and glyphs, drawn with PIL.

A mask is a float32 array [SIZE, SIZE] in 0..1: how much of each pixel the object covers. Everything is drawn at twice
the size and averaged down, so edges are soft.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 32
_SCALE = 2
_STROKE = 2  # of an outline, in enlarged pixels
_FAINT = 100  # body of an outlined shape, of 255
_CANVAS = SIZE * _SCALE


def _regular(corners: int, turn: float = 0.0, radius: float = 1.0) -> np.ndarray:
    angle = np.arange(corners) * (2 * math.pi / corners) + math.radians(turn)
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)


def _star() -> np.ndarray:
    points = _regular(10)
    points[1::2] *= 0.42
    return points


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 28, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([np.sin(t) ** 3, -(y + 2) / 16], axis=1)


def _moon() -> np.ndarray:
    outer = np.radians(np.linspace(40, 320, 20))
    inner = np.radians(np.linspace(300, 60, 14))
    rim = np.stack([np.cos(outer), np.sin(outer)], axis=1)
    bite = np.stack([0.45 + 0.72 * np.cos(inner), 0.72 * np.sin(inner)], axis=1)
    return np.concatenate([rim, bite])


_HALF = np.radians(np.linspace(180, 360, 18))
_DOME = np.stack([np.cos(_HALF), np.sin(_HALF) + 0.45], axis=1)
_ARM = np.array([(-0.3, -0.3), (-0.3, -1), (0.3, -1)])
_CROSS = np.concatenate([_ARM, _ARM[:, ::-1] * (-1, 1), -_ARM, _ARM[:, ::-1] * (1, -1)])
_ARROW = [(0, -1), (0.8, -0.1), (0.3, -0.1), (0.3, 1), (-0.3, 1), (-0.3, -0.1), (-0.8, -0.1)]

# name -> polygons in the unit circle, y down; the first is the body, any further one is a hole
POLYGONS: dict[str, tuple[np.ndarray, ...]] = {
    "circle": (_regular(28, radius=0.95),),
    "square": (_regular(4, turn=45, radius=1.15),),
    "triangle": (_regular(3) + (0, 0.2),),
    "diamond": (_regular(4) * (0.7, 1.05),),
    "star": (_star(),),
    "cross": (_CROSS,),
    "heart": (_heart(),),
    "ring": (_regular(28), _regular(24, radius=0.5)),
    "arrow": (np.array(_ARROW),),
    "moon": (_moon(),),
    "hexagon": (_regular(6, turn=30),),
    "dome": (_DOME,),
}


def affine(turn: float = 0.0, slant: float = 0.0) -> np.ndarray:
    """[2, 2] matrix for row vectors (x, y), y down: shear the top to the right, then turn clockwise by degrees."""
    angle = math.radians(turn)
    rotate = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return np.array([[1.0, 0.0], [-slant, 1.0]]) @ rotate


def _finish(canvas: Image.Image) -> np.ndarray:
    return np.asarray(canvas.reduce(_SCALE), dtype=np.float32) / 255.0


def shape_mask(
    name: str, centres: list[tuple[float, float]], radius: float, matrices: list[np.ndarray], outline: bool = False
) -> np.ndarray:
    """Mask of one or more copies of a shape. `centres` and `radius` in pixels, one [2, 2] matrix per copy."""
    canvas = Image.new("L", (_CANVAS, _CANVAS), 0)
    draw = ImageDraw.Draw(canvas)
    for centre, matrix in zip(centres, matrices, strict=True):
        for index, polygon in enumerate(POLYGONS[name]):
            points = (polygon @ matrix * radius + centre) * _SCALE - 0.5
            corners = [(float(x), float(y)) for x, y in points]
            draw.polygon(corners, fill=0 if index else (_FAINT if outline else 255))
            if outline:
                draw.line([*corners, corners[0], corners[1]], fill=255, width=_STROKE, joint="curve")
    return _finish(canvas)


@functools.lru_cache(maxsize=64)
def _font(points: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(points)


def glyph_mask(
    text: str, centre: tuple[float, float], height: float, matrix: np.ndarray, weight: int = 1
) -> np.ndarray:
    """Mask of one digit or letter in PIL's bundled font, of `height` pixels and thickened by `weight` (0 to 2)."""
    canvas = Image.new("L", (_CANVAS, _CANVAS), 0)
    draw = ImageDraw.Draw(canvas)
    middle = _CANVAS / 2
    font = _font(round(height * _SCALE))
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    draw.text(
        (middle - (left + right) / 2, middle - (top + bottom) / 2), text, fill=255, font=font, stroke_width=weight
    )
    # PIL wants the map from output to input pixels: p_in = (p_out - target) @ inverse + middle
    inverse = np.linalg.inv(matrix)
    target = np.asarray(centre) * _SCALE
    offset = middle - target @ inverse
    coefficients = (inverse[0, 0], inverse[1, 0], offset[0], inverse[0, 1], inverse[1, 1], offset[1])
    return _finish(
        canvas.transform((_CANVAS, _CANVAS), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    )


Texture = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]

# name -> 1 where the object shows its colour, 0 where its dark tone; u and v count periods across and down
TEXTURES: dict[str, Texture] = {
    "plain": lambda u, v, rng: np.ones_like(u),
    "striped": lambda u, v, rng: v % 1 < 0.5,
    "dotted": lambda u, v, rng: (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 > 0.12,
    "checkered": lambda u, v, rng: (u % 1 < 0.5) == (v % 1 < 0.5),
    "netted": lambda u, v, rng: ((u + v) * 0.7 % 1 > 0.3) & ((u - v) * 0.7 % 1 > 0.3),
    "speckled": lambda u, v, rng: rng.random(u.shape) > 0.45,
}
_AXIS = np.arange(SIZE, dtype=np.float32) - (SIZE - 1) / 2
_GRID_Y, _GRID_X = np.meshgrid(_AXIS, _AXIS, indexing="ij")


def texture(name: str, period: float, turn: float, rng: np.random.Generator) -> np.ndarray:
    """[SIZE, SIZE] float32 of 0 and 1: the named pattern with a random phase; `period` in pixels, `turn` in degrees."""
    angle = math.radians(turn)
    shift = rng.random(2)
    u = (_GRID_X * math.cos(angle) + _GRID_Y * math.sin(angle)) / period + shift[0]
    v = (_GRID_Y * math.cos(angle) - _GRID_X * math.sin(angle)) / period + shift[1]
    return np.asarray(TEXTURES[name](u, v, rng), dtype=np.float32)
