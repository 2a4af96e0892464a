"""Captions are true of their scene, partial, and readable for the tokenizer."""

import re

import numpy as np

from fastlora.continual.demo import captions, world
from fastlora.continual.demo.captions import caption, plural
from fastlora.continual.demo.tokenizer import WordTokenizer
from fastlora.continual.demo.world import Scene, sample_scene

NOUNS = {form: (shape, several) for shape in world.SHAPES for form, several in ((shape, False), (plural(shape), True))}


def pairs(n=3000):
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(n)]
    return [(scene, caption(scene, rng)) for scene in scenes]


def test_every_word_of_a_caption_is_true_of_the_scene():
    named = set()
    for scene, text in pairs():
        words = text.split()
        place = {"center": "in the center", "left": "on the left", "right": "on the right"}
        for word in words:
            if word in world.COLOURS:
                assert word == scene.colour, text
            elif word in world.TEXTURES:
                assert word == scene.texture and scene.kind in ("shape", "swatch"), text
            elif word in NOUNS:
                assert NOUNS[word] == (scene.name, scene.count > 1) and scene.kind == "shape", text
            elif word in captions.NUMBERS:
                assert captions.NUMBERS.index(word) + 1 == scene.count and scene.kind == "shape", text
            elif word in world.POSITIONS:
                assert word == scene.position, text
                assert text.endswith(place.get(word, f"at the {word}")), text
            elif word in ("digit", "letter"):
                assert f"{word} {scene.name}" in text and word == scene.kind, text
            elif word == "pattern":
                assert scene.kind == "swatch", text
            elif word in ("object", "objects"):
                assert scene.kind == "shape" and (word == "objects") == (scene.count > 1), text
            else:
                continue
            named.add(word)
        assert not re.search(r"\ba [aeiou]\w", text) and not re.search(r"\ban [^aeiou]", text), text
        assert "{" not in text and "  " not in text and text == text.strip()
    assert named >= {*world.COLOURS, *world.TEXTURES, *NOUNS, *captions.NUMBERS, *world.POSITIONS}


def test_captions_are_partial():
    rng = np.random.default_rng(0)
    scene = Scene("shape", "star", "red", "striped", "left")
    texts = {caption(scene, rng) for _ in range(300)}
    assert len(texts) == len(captions.SINGLE) >= 10
    for word in ("star", "red", "striped", "left"):
        assert any(word in text for text in texts) and any(word not in text for text in texts)


def test_every_caption_fits_the_tokenizer():
    tokenizer = WordTokenizer()
    texts = [text for _, text in pairs(1000)]
    assert tokenizer(texts).shape == (1000, 16)


def test_same_generator_same_captions():
    assert pairs(50) == pairs(50)
