import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mars.data.crops import MAX_ASPECT, Sizes, buckets, nearest_bucket
from mars.errors import RequestError

SIDES = st.integers(16, 400)


def ramp(width: int, height: int) -> Image.Image:
    """Red grows from left to right over 0..255, green from top to bottom."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([red, green, np.zeros_like(red)], axis=2).round().astype(np.uint8))


@given(side=st.integers(1, 32))
def test_buckets_hold_about_as_many_codes_as_the_square(side: int) -> None:
    found = buckets(side)
    assert (side, side) in found
    assert len(set(found)) == len(found)
    for rows, columns in found:
        assert (columns, rows) in found
        assert max(rows, columns) <= MAX_ASPECT * min(rows, columns)
        assert side * side - max(rows, columns) < rows * columns <= side * side


def test_the_buckets_of_64_codes() -> None:
    assert buckets(8) == [(6, 10), (7, 9), (8, 8), (9, 7), (10, 6)]


@given(width=SIDES, height=SIDES)
def test_the_bucket_of_a_picture_is_the_one_with_the_nearest_aspect(width: int, height: int) -> None:
    rows, columns = nearest_bucket(8, aspect=width / height)
    assert nearest_bucket(8, aspect=height / width) in {(columns, rows), (rows, columns)}
    ratio = (columns / rows) / (width / height)
    assert all(max(ratio, 1 / ratio) <= max(other, 1 / other) + 1e-9 for other in
               ((c / r) / (width / height) for r, c in buckets(8)))  # fmt: skip


@given(
    width=SIDES, height=SIDES, sizes=st.sampled_from([(32,), (64, 32), (32, 64, 96)]),
    crop=st.sampled_from(["center", "random", "none"]), aspect_buckets=st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_images_have_the_size_that_was_asked_for(
    width: int, height: int, sizes: tuple[int, ...], crop: str, aspect_buckets: bool
) -> None:
    chosen = Sizes(factor=16, sizes=sizes, crop=crop, aspect_buckets=aspect_buckets)  # type: ignore[arg-type]
    images = chosen.images(ramp(width, height), key="k")
    for size, image in zip(sizes, images, strict=True):
        assert image.mode == "RGB"
        assert image.width % 16 == image.height % 16 == 0
        if aspect_buckets:
            assert 0.6 * size * size < image.width * image.height <= size * size
            assert image.width / image.height == images[0].width / images[0].height
        else:
            assert image.size == (size, size)


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("aspect_buckets", [False, True])
@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (640, 160)])
def test_all_sizes_show_the_same_part_undistorted(crop: str, aspect_buckets: bool, shape: tuple[int, int]) -> None:
    chosen = Sizes(factor=16, sizes=(64, 128), crop=crop, aspect_buckets=aspect_buckets)  # type: ignore[arg-type]
    image = ramp(*shape)
    small, large = (np.asarray(one, dtype=float) for one in chosen.images(image, key="some key"))
    halved = large.reshape(small.shape[0], 2, small.shape[1], 2, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(halved, small, atol=2.5)
    across = (small[0, -1, 0] - small[0, 0, 0]) / 255 * (shape[0] - 1) / (small.shape[1] - 1)
    down = (small[-1, 0, 1] - small[0, 0, 1]) / 255 * (shape[1] - 1) / (small.shape[0] - 1)
    assert across == pytest.approx(down, rel=0.06)  # pixels of the picture per pixel of the image


def test_the_middle_is_the_middle_and_a_random_place_is_the_keys() -> None:
    def left(crop: str, key: str) -> float:
        image = Sizes(factor=16, sizes=(64,), crop=crop).images(ramp(400, 100), key=key)[0]  # type: ignore[arg-type]
        return float(np.asarray(image, dtype=float)[32, :, 0].mean())

    assert left("center", "a") == pytest.approx(127.5, abs=1)
    places = {key: left("random", key) for key in map(str, range(12))}
    assert places == {key: left("random", key) for key in places}
    assert min(places.values()) < 80
    assert max(places.values()) > 170


def test_without_a_crop_the_whole_picture_is_on_a_white_page() -> None:
    image = np.asarray(Sizes(factor=16, sizes=(64,), crop="none").images(ramp(200, 100), key="k")[0])
    assert (image[:15] == 255).all()
    assert (image[-15:] == 255).all()
    assert image[32, 0, 0] < 5
    assert image[32, -1, 0] > 250


def test_without_sizes_pictures_stay_as_they_are() -> None:
    image = ramp(48, 32)
    (same,) = Sizes(factor=16).images(image, key="k")
    assert hashlib.sha256(same.tobytes()).digest() == hashlib.sha256(image.tobytes()).digest()
    with pytest.raises(RequestError, match="multiples of 16, got 40x32; give --size"):
        Sizes(factor=16).images(ramp(40, 32), key="k")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sizes": (100,)}, "size must be a multiple of 16, got 100; near are 96 and 112"),
        ({"sizes": (8,)}, "got 8; near are 16 and 32"),
        ({"sizes": (64, 64)}, "sizes must differ"),
        ({"sizes": (64, 96), "aspect_buckets": True}, "multiples of the smallest, got 96 and 64"),
        ({"crop": "random"}, "cropped to a size, got none"),
        ({"aspect_buckets": True}, "cropped to a size, got none"),
        ({"sizes": (64,), "crop": "left"}, "crop must be center, random, none, got left"),
    ],
)
def test_what_cannot_be_done_is_one_line(wrong: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Sizes(factor=16, **wrong)
