import io
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mars.data.ingestion import decoding
from mars.data.ingestion.decoding import stored_form
from mars.errors import ImageError

EXIF_TURN = 6
"""Turn a quarter clockwise to see it upright."""


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photo(mode: str = "RGB", size: tuple[int, int] = (40, 24)) -> Image.Image:
    cells = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC).convert(mode)


def pixels(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(
    ("kind", "mode", "suffix"),
    [
        ("PNG", "RGB", "png"), ("PNG", "L", "png"), ("PNG", "P", "png"), ("PNG", "1", "png"), ("PNG", "RGBA", "png"),
        ("JPEG", "RGB", "jpg"), ("JPEG", "L", "jpg"), ("MPO", "RGB", "jpg"), ("WEBP", "RGB", "webp"),
    ],
)  # fmt: skip
def test_a_sound_picture_keeps_its_bytes(kind: str, mode: str, suffix: str) -> None:
    content = encoded(photo(mode), kind)
    found = stored_form(content)
    assert (found.content, found.suffix, found.width, found.height) == (content, suffix, 40, 24)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("GIF", "P"), ("BMP", "RGB"), ("TIFF", "RGB"), ("TIFF", "CMYK"), ("JPEG", "CMYK"), ("TIFF", "LAB"), ("GIF", "L")],
)
def test_other_kinds_become_png_of_the_same_pixels(kind: str, mode: str) -> None:
    content = encoded(photo(mode), kind)
    found = stored_form(content)
    assert found.suffix == "png"
    with Image.open(io.BytesIO(found.content)) as image:
        assert image.format == "PNG"
        assert image.mode in ("RGB", "L")
    np.testing.assert_array_equal(pixels(found.content), pixels(content))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_kept(kind: str) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue", "green")]
    found = stored_form(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert found.suffix == "png"
    with Image.open(io.BytesIO(found.content)) as image:
        assert getattr(image, "n_frames", 1) == 1
    assert np.abs(pixels(found.content).astype(int) - [255, 0, 0]).max() < 6


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_picture_is_turned_as_its_camera_was_held(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = EXIF_TURN
    content = encoded(photo(), kind, exif=exif)
    found = stored_form(content)
    assert (found.suffix, found.width, found.height) == ("png", 24, 40)
    np.testing.assert_array_equal(pixels(found.content), np.rot90(pixels(encoded(photo(), kind)), k=-1))
    assert stored_form(found.content) == found, "it would be turned again"


def test_what_is_seen_through_is_seen_on_white() -> None:
    image = photo("RGBA")
    image.putpixel((0, 0), (255, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 128))
    found = stored_form(encoded(image, "PNG"))
    assert pixels(found.content)[0, 0].tolist() == [255, 255, 255]
    assert pixels(found.content)[0, 1].tolist() == [127, 127, 127]
    np.testing.assert_array_equal(pixels(found.content)[1:], np.asarray(image.convert("RGB"))[1:])


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_colour_of_a_palette_that_is_seen_through_is_white(kind: str) -> None:
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, 200, 10, 10])
    image.paste(0, (0, 0, 10, 20))
    found = pixels(stored_form(encoded(image, kind, transparency=0)).content)
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[0, 15].tolist() == [200, 10, 10]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled_to_8(kind: str) -> None:
    grey = np.linspace(0, 65535, 40 * 24).reshape(24, 40).astype(np.uint16)
    found = stored_form(encoded(Image.fromarray(grey), kind))
    np.testing.assert_allclose(pixels(found.content)[:, :, 0], grey / 257, atol=1)
    assert stored_form(found.content) == found


def test_values_without_bounds_are_refused() -> None:
    with pytest.raises(ImageError, match="^unbounded pixel values"):
        stored_form(encoded(photo("F"), "TIFF"))


@pytest.mark.parametrize("side", [8_100, 30_000, 2**31 - 1])
def test_too_many_pixels_are_refused_before_they_are_decoded(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray(encoded(photo(), "GIF"))
    if side < 2**16:
        content[6:10] = side.to_bytes(2, "little") * 2  # a GIF's size is of 16 bits
    else:
        content = bytearray(encoded(photo(), "BMP"))
        content[18:26] = side.to_bytes(4, "little") * 2
    with pytest.raises(ImageError, match="^too many pixels"):
        stored_form(bytes(content))


def test_files_that_are_too_large_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_BYTES", 100)
    with pytest.raises(ImageError, match=r"^too many bytes \([\d,]+, at most 100\)$"):
        stored_form(encoded(photo(), "BMP"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_file_that_is_cut_is_never_stored(kind: str) -> None:
    whole = encoded(photo(size=(64, 64)), kind)
    for tenth in range(9):
        with pytest.raises(ImageError) as caught:
            stored_form(whole[: len(whole) * tenth // 10])
        assert str(caught.value).startswith(("damaged", "not a picture", "empty"))
        assert "\n" not in str(caught.value)


@given(kind=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]), data=st.data())
def test_wrong_bytes_are_a_picture_or_an_image_error_that_is_always_the_same(kind: str, data: st.DataObject) -> None:
    content = bytearray(encoded(photo(), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))

    def outcome() -> object:
        try:
            return stored_form(bytes(content))
        except ImageError as error:
            return str(error)

    assert outcome() == outcome()


def test_a_wrong_bit_in_a_png_is_found(picture_file: Callable[..., bytes]) -> None:
    whole = picture_file(1)
    for place in range(33, len(whole) - 12, 97):
        content = bytearray(whole)
        content[place] ^= 1
        with pytest.raises(ImageError, match="^damaged"):
            stored_form(bytes(content))
