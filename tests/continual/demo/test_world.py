"""The renderer: pictures show what their scene says, and the same generator gives the same bytes."""

import numpy as np
import pytest
from scipy import ndimage

from fastlora.continual.demo import masks, world
from fastlora.continual.demo.world import Look, Scene, render, sample_scene

CLOSE_UP = Look(close_up=True)


def rng(seed=0):
    return np.random.default_rng(seed)


def foreground(pixels):
    """Bright pixels of one picture: grounds stay below 87 before noise, a plain white object near 245."""
    return pixels.min(axis=-1) > 150


def test_shape_dtype_and_an_empty_list():
    scenes = [sample_scene(rng(i)) for i in range(5)]
    pixels = render(scenes, rng())
    assert pixels.shape == (5, 32, 32, 3) and pixels.dtype == np.uint8
    assert render([], rng()).shape == (0, 32, 32, 3)


def test_same_generator_same_bytes():
    scenes = [sample_scene(rng(i)) for i in range(20)]
    first, again, other = (render(scenes, rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_sampling_covers_the_world():
    generator = rng()
    scenes = [sample_scene(generator) for _ in range(4000)]
    shapes = [scene for scene in scenes if scene.kind == "shape"]
    assert {scene.name for scene in shapes} == set(world.SHAPES) and len(world.SHAPES) == 12
    assert {scene.texture for scene in shapes} == set(world.TEXTURES) and len(world.TEXTURES) == 6
    assert {scene.count for scene in shapes} == {1, 2, 3, 4}
    assert {scene.colour for scene in scenes} == set(world.COLOURS) and len(world.COLOURS) == 10
    assert {scene.position for scene in scenes} == {*world.POSITIONS, None} and len(world.POSITIONS) == 5
    for kind, names in (("digit", world.DIGITS), ("letter", world.LETTERS), ("swatch", world.TEXTURES)):
        assert {scene.name for scene in scenes if scene.kind == kind} == set(names)
    assert len(world.DIGITS) == len(world.LETTERS) == 10
    assert all((scene.position is None) == (scene.count > 1) for scene in scenes)


@pytest.mark.parametrize("position", world.POSITIONS)
def test_objects_stand_where_the_scene_says(position):
    pixels = render([Scene("shape", "circle", "white", position=position)] * 10, rng())
    for one in pixels:
        row, column = ndimage.center_of_mass(foreground(one))
        assert np.abs(np.array([column + 0.5, row + 0.5]) - world.POSITIONS[position]).max() < 2


@pytest.mark.parametrize("look", [Look(), Look(turn=(15.0, 45.0))], ids=["world", "counting"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_as_many_objects_as_the_scene_says(count, look):
    for shape in ("circle", "square", "heart"):
        scene = Scene("shape", shape, "white", position="center" if count == 1 else None, count=count)
        found = [ndimage.label(foreground(one), np.ones((3, 3)))[1] for one in render([scene] * 15, rng(), look)]
        assert np.mean([number == count for number in found]) > 0.9  # jitter may make two objects touch


@pytest.mark.parametrize("name", world.COLOURS)
def test_objects_have_the_colour_that_the_scene_says(name):
    palette = np.array(list(world.COLOURS.values()))
    pixels = render([Scene("shape", "square", name)] * 20, rng())
    seen = pixels[:, 13:19, 13:19].mean(axis=(0, 1, 2))  # the middle of the square
    assert list(world.COLOURS)[np.square(palette - seen).sum(axis=1).argmin()] == name


def test_shapes_and_glyphs_are_distinct_and_inside_the_frame():
    upright = [masks.affine()]
    drawn = {name: masks.shape_mask(name, [(16, 16)], 9.0, upright) for name in world.SHAPES}
    drawn |= {name: masks.glyph_mask(name, (16, 16), 22, upright[0]) for name in (*world.DIGITS, *world.LETTERS)}
    for name, mask in drawn.items():
        assert mask.shape == (32, 32) and mask.dtype == np.float32 and 0 <= mask.min() and mask.max() == 1, name
        assert max(mask[0].max(), mask[-1].max(), mask[:, 0].max(), mask[:, -1].max()) == 0, name
        others = [np.abs(mask - other).sum() for key, other in drawn.items() if key != name]
        assert min(others) > 15, name  # in pixels of difference


def test_affine_turns_clockwise_and_slants_the_top_to_the_right():
    up = np.array([0.0, -1.0])
    assert np.allclose(up @ masks.affine(turn=90), [1, 0])
    assert np.allclose(up @ masks.affine(slant=0.5), [0.5, -1])
    arrow = masks.shape_mask("arrow", [(16, 16)], 10.0, [masks.affine(turn=90)])
    assert arrow[:, 20:].sum(axis=0).max() > 1.4 * arrow[:, :12].sum(axis=0).max()  # the head points right
    upright, turned = (masks.glyph_mask("T", (16, 16), 22, masks.affine(turn=t)) for t in (0, 90))
    assert upright[:14].sum() > upright[18:].sum() and turned[:, 18:].sum() > turned[:, :14].sum()


def test_textures():
    textures = {name: masks.texture(name, 8.0, 0.0, rng()) for name in world.TEXTURES}
    assert all(set(np.unique(value)) <= {0.0, 1.0} for value in textures.values())
    assert textures["plain"].all()
    assert all((~value.astype(bool)).mean() > 0.15 for name, value in textures.items() if name != "plain")
    assert (textures["striped"] == textures["striped"][:, :1]).all()  # horizontal
    assert ndimage.label(1 - textures["dotted"])[1] >= 9


def test_an_outline_has_less_ink_and_a_hollow_body():
    scene = [Scene("shape", "square", "white")]
    filled, outline = (foreground(render(scene, rng(), look)[0]) for look in (Look(), Look(outline=True)))
    assert outline.sum() < 0.5 * filled.sum() and not outline[16, 16] and filled[16, 16]


def test_inverted_is_the_negative():
    scenes = [sample_scene(rng(i)) for i in range(4)]
    assert np.array_equal(render(scenes, rng(), Look(inverted=True)), 255 - render(scenes, rng()))


def test_a_cast_dims_but_keeps_one_channel():
    scenes = [Scene("shape", "circle", "white")] * 30
    plain, cast = (render(scenes, rng(), look)[:, 16, 16].astype(float) for look in (Look(), Look(cast=0.9)))
    share = cast / plain
    assert (share.max(axis=1) > 0.9).all() and (share.min(axis=1) < 0.62).all()


def test_a_swatch_fills_the_frame():
    pixels = render([Scene("swatch", "plain", "white", "plain")] * 5, rng())
    assert pixels.min() > 150


def test_a_close_up_is_coarser():
    scene = [Scene("swatch", "checkered", "white", "checkered")] * 5
    edges = [np.abs(np.diff(render(scene, rng(), look).astype(float), axis=2)).mean() for look in (Look(), CLOSE_UP)]
    assert edges[1] < 0.75 * edges[0]
