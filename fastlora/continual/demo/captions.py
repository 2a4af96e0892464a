"""Captions of the demo world: each names a random part of what the picture shows.

Partial captions are what makes zero-shot work: a model that only ever read "a striped red star on the left" would have
no idea what "a star" alone looks like.
"""

from __future__ import annotations

import re

import numpy as np

from fastlora.continual.demo.world import Scene

NUMBERS = ("one", "two", "three", "four")
PLURALS = {"cross": "crosses"}

SINGLE = (
    "a {noun}",
    "a {colour} {noun}",
    "a {texture} {noun}",
    "a {texture} {colour} {noun}",
    "a picture of a {colour} {noun}",
    "a photo of a {noun} {place}",
    "a drawing of a {texture} {noun} {place}",
    "the {noun} is {colour}",
    "a {colour} object {place}",
    "a {texture} object",
    "{number} {colour} {noun}",
    "a photo of {number} object",
)
SEVERAL = (
    "{number} {noun}",
    "{number} {colour} {noun}",
    "{number} {texture} {noun}",
    "{number} objects",
    "a picture of {number} objects",
    "a photo of {number} {colour} objects",
    "a drawing of {number} {texture} {colour} {noun}",
)
SWATCH = (
    "a {texture} pattern",
    "a {texture} {colour} pattern",
    "a picture of a {texture} pattern",
    "a photo of a {texture} {colour} pattern",
    "the pattern is {texture}",
    "the {texture} pattern is {colour}",
)
GLYPH = (
    "the {kind} {name}",
    "a {colour} {kind} {name}",
    "a picture of the {kind} {name}",
    "a photo of a {colour} {kind} {name}",
    "a drawing of the {kind} {name} {place}",
    "the {kind} {name} is {colour}",
)
PLACES = {
    "center": "in the center",
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
}


def plural(noun: str) -> str:
    return PLURALS.get(noun, noun + "s")


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A sentence that is true of the scene, without a full stop, such as "a striped star" or "three blue hearts"."""
    patterns = {"shape": SINGLE if scene.count == 1 else SEVERAL, "swatch": SWATCH}.get(scene.kind, GLYPH)
    text = patterns[rng.integers(len(patterns))].format(
        kind=scene.kind,
        name=scene.name,
        noun=scene.name if scene.count == 1 else plural(scene.name),
        colour=scene.colour,
        texture=scene.texture,
        number=NUMBERS[scene.count - 1],
        place=PLACES.get(scene.position or "", ""),
    )
    return re.sub(r"\ba (?=[aeiou])", "an ", text)
