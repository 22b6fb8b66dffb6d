import io
from itertools import product

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from mars.data.scene_words import COLOURS, SHAPES, Scene, SceneObject
from mars.data.scenes import draw_scene, make_scene
from mars.evaluation.detector import Found, detect, found_in


def things(found: list[Found]) -> list[tuple[str | None, str | None]]:
    return sorted((one.shape, one.colour) for one in found if one.shape and one.colour) + [
        (None, None) for one in found if not (one.shape and one.colour)
    ]


def picture(shape: str, colour: str, *, width: int = 40) -> Image.Image:
    item = SceneObject(shape=shape, colour=colour, size="medium", box=(20, 30, 20 + width, 30 + width))
    return draw_scene(Scene(kind="single", objects=(item,), relation=None, size=128))


@pytest.mark.parametrize(("size", "count"), [(128, 100), (256, 15)])
def test_true_pictures_are_read_as_what_they_are(size: int, count: int) -> None:
    scenes = [make_scene(index, seed=size, size=size) for index in range(count)]
    wrong = []
    for scene in scenes:
        found, true = detect(draw_scene(scene)), found_in(scene)
        if things(found) != things(true):
            wrong.append(scene)
            continue
        for thing in true:
            near = min(found, key=lambda one: np.hypot(*np.subtract(one.centre, thing.centre)))
            assert (near.shape, near.colour) == (thing.shape, thing.colour)
            assert abs(near.width - thing.width) < 2.5 / size
            assert np.abs(np.subtract(near.centre, thing.centre)).max() < 2.5 / size
    assert not wrong


def test_shapes_and_colours_are_known_when_blurred_and_noisy() -> None:
    dice = np.random.default_rng(0)
    for shape, colour in list(product(SHAPES, COLOURS))[::3]:
        blurred = np.asarray(picture(shape, colour).filter(ImageFilter.GaussianBlur(1.5))).astype(float)
        noisy = (blurred + dice.normal(0, 8, blurred.shape)).clip(0, 255).astype(np.uint8)
        assert things(detect(Image.fromarray(noisy))) == [(shape, colour)]


def test_what_is_no_shape_or_of_no_colour_is_found_as_such() -> None:
    bar, face, pale = (Image.new("RGB", (128, 128), "white") for _ in range(3))
    ImageDraw.Draw(bar).rectangle((10, 50, 110, 70), fill=COLOURS["red"].rgb)
    assert [(one.shape, one.colour) for one in detect(bar)] == [(None, "red")]
    pen = ImageDraw.Draw(face)
    for column, colour in enumerate(("red", "blue", "green", "black")):
        pen.rectangle((20 + 20 * column, 20, 39 + 20 * column, 99), fill=COLOURS[colour].rgb)
    assert [(one.shape, one.colour) for one in detect(face)] == [("square", None)]
    ImageDraw.Draw(pale).ellipse((20, 20, 80, 80), fill=(120, 250, 250))
    assert [(one.shape, one.colour) for one in detect(pale)] == [("circle", None)]


def test_an_empty_picture_noise_and_specks_hold_nothing_and_a_photograph_no_things() -> None:
    assert detect(Image.new("RGB", (128, 128), "white")) == []
    dice = np.random.default_rng(0)
    assert detect(Image.fromarray(dice.integers(225, 256, (128, 128, 3)).astype(np.uint8))) == []
    speck = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(speck).rectangle((3, 3, 8, 8), fill="black")
    assert detect(speck) == []
    assert all(one.shape is None for one in detect(Image.new("RGB", (128, 100), "grey")))
    texture = Image.fromarray(dice.integers(0, 256, (128, 128, 3)).astype(np.uint8))
    assert not [one for one in detect(texture) if one.shape and one.colour]


def test_things_that_touch_are_not_taken_for_two() -> None:
    one = picture("circle", "red")
    ImageDraw.Draw(one).ellipse((59, 30, 99, 70), fill=COLOURS["red"].rgb)
    assert things(detect(one)) == [(None, None)]


def test_neighbours_that_a_blur_joined_are_told_apart() -> None:
    image = Image.new("RGB", (128, 128), "white")
    pen = ImageDraw.Draw(image)
    for left in (10, 54):
        pen.rectangle((left, 40, left + 39, 79), fill=COLOURS["black"].rgb)
    found = detect(image.filter(ImageFilter.GaussianBlur(1.5)))
    assert things(found) == [("square", "black")] * 2


def test_a_picture_file_reads_like_its_pixels() -> None:
    file = io.BytesIO()
    picture("heart", "green").save(file, "PNG")
    assert detect(Image.open(file)) == detect(picture("heart", "green"))
