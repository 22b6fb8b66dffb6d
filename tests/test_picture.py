import contextlib
import gc
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageChops, ImageOps
from PIL._util import DeferredError

from mars.errors import ImageError
from mars.picture import GeneratedImage, on_white_page, open_picture, read_picture

TEXT = {"prompt": '红苹果 \N{GRINNING FACE} "quoted"\nsecond line', "seed": "7", "settings": json.dumps({"top_p": 0.9})}


def blocks() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    blocks().save(file, kind)
    return file.getvalue()


def png_of_size(path: Path, width: int, height: int) -> Path:
    """A black 1-bit PNG; 20,000 x 20,000 takes 50 KB."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    packer = zlib.compressobj(1)
    row = bytes(1 + (width + 7) // 8)
    rows = b"".join([packer.compress(row * 1000) for _ in range(height // 1000)]) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    return path


def test_text_survives_a_png_file(tmp_path: Path) -> None:
    image = GeneratedImage(blocks(), TEXT)
    assert image.info == TEXT
    image.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as found:
        assert found.info == TEXT
        assert found.tobytes() == blocks().tobytes()
        found.save(tmp_path / "b.bmp")


def test_bytes_are_the_same_each_time_and_need_no_file(tmp_path: Path) -> None:
    files = [io.BytesIO(), io.BytesIO()]
    for file in files:
        GeneratedImage(blocks(), TEXT).save(file, "PNG")
    assert files[0].getvalue() == files[1].getvalue()
    GeneratedImage(blocks(), TEXT).save(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == files[0].getvalue()


@pytest.mark.parametrize("name", ["a.jpg", "a.webp", "JPEG", "webp"])
def test_jpeg_and_webp_carry_the_text_in_exif(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    GeneratedImage(blocks(), TEXT | {"software": "mars-t2i 9"}).save(file, format=None if file.suffix else name)
    with Image.open(file) as found:
        assert found.size == (48, 32)
        exif = found.getexif()
    assert exif[ExifTags.Base.Software] == "mars-t2i 9"
    comment = exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment.startswith(b"ASCII\0\0\0")
    assert json.loads(comment[8:]) == TEXT | {"software": "mars-t2i 9"}


def test_other_formats_are_saved_without_the_text(tmp_path: Path) -> None:
    GeneratedImage(blocks(), TEXT).save(tmp_path / "a.bmp")
    with Image.open(tmp_path / "a.bmp") as found:
        assert found.size == (48, 32)
        assert "prompt" not in found.info


def test_a_drawn_picture_is_a_picture_like_any_other() -> None:
    image = GeneratedImage(blocks(), TEXT)
    assert image.resize((24, 16)).size == (24, 16)
    assert image.convert("L").mode == "L"
    assert np.asarray(image).tolist() == np.asarray(blocks()).tolist()
    assert image.copy().tobytes() == blocks().tobytes()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pictures_of_users_are_read_whole(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a").write_bytes(encoded(kind))
    found = open_picture(tmp_path / "a")
    assert found.size == (48, 32)
    (tmp_path / "a").unlink()
    assert np.abs(np.asarray(found.convert("RGB"), dtype=int) - np.asarray(blocks(), dtype=int)).mean() < 60


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_is_read(tmp_path: Path, mode: str) -> None:
    image = Image.new("I;16", (20, 20), 30000) if mode == "I;16" else blocks().convert(mode)
    image.save(tmp_path / "a", "JPEG" if mode == "CMYK" else "PNG")
    assert open_picture(tmp_path / "a").size == image.size


def test_16_bits_are_scaled_to_8(tmp_path: Path) -> None:
    Image.new("I;16", (20, 20), 128 * 257).save(tmp_path / "a", "PNG")
    assert open_picture(tmp_path / "a").convert("RGB").getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_cut_anywhere_is_one_line(tmp_path: Path, kind: str) -> None:
    whole, path = encoded(kind), tmp_path / "cut"
    for size in (*range(1, 200), *range(200, len(whole) - 20, 97)):
        path.write_bytes(whole[:size])
        with pytest.raises(ImageError, match="is not a picture|is damaged or cut short") as caught:
            open_picture(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_with_wrong_bytes_opens_or_is_an_image_error(tmp_path: Path, kind: str) -> None:
    whole, numbers = encoded(kind), np.random.default_rng(0)
    for _ in range(150):
        content = bytearray(whole)
        for place in numbers.integers(0, min(len(whole), 400), 3):
            content[place] = numbers.integers(256)
        (tmp_path / "a").write_bytes(bytes(content))
        with contextlib.suppress(ImageError):
            open_picture(tmp_path / "a")


def test_a_damaged_picture_is_let_go_though_its_error_is_held(tmp_path: Path) -> None:
    Image.effect_noise((311, 313), 50).convert("RGB").save(tmp_path / "one.png")
    content = (tmp_path / "one.png").read_bytes()[:20_000]
    with pytest.raises(ImageError, match="damaged or cut short") as _error:
        read_picture(io.BytesIO(content), name="one")
    held = [one for one in gc.get_objects() if issubclass(type(one), Image.Image) and one.size == (311, 313)]
    assert held  # by the frames of the error
    assert all(isinstance(one._im, DeferredError) for one in held)


def test_what_is_no_picture_is_one_line(tmp_path: Path) -> None:
    cases = {
        "a.txt": (b"a red apple\n", "is not a picture; give a PNG, JPEG or WebP file"),
        "a.png": (b"", "is not a picture"),
        "a.gif": (encoded("GIF"), "must be PNG, JPEG or WebP, got GIF; convert it"),
        "a.bmp": (encoded("BMP"), "must be PNG, JPEG or WebP, got BMP"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=message):
            open_picture(tmp_path / name)
    for path in (tmp_path, tmp_path / "none.png"):
        with pytest.raises(ImageError, match="no picture at"):
            open_picture(path)


@pytest.mark.parametrize("size", [(1, 1), (15, 40), (40, 15)])
def test_a_picture_that_is_too_small_is_one_line(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match=f"at least 16 pixels on each side, got {size[0]}x{size[1]}"):
        open_picture(tmp_path / "a.png")


@pytest.mark.parametrize("side", [9_000, 20_000])
def test_a_picture_that_is_too_large_is_one_line(tmp_path: Path, side: int) -> None:
    path = png_of_size(tmp_path / "a.png", side, side)
    with pytest.raises(ImageError, match="must have at most 64,000,000 pixels, got .*; shrink it"):
        open_picture(path)


def test_a_picture_that_is_rather_large_is_one_line_too(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="must have at most 64,000,000 pixels"):
        open_picture(png_of_size(tmp_path / "a.png", 10_000, 10_000))


def halves() -> Image.Image:
    """Black above, white below, and a grey column at the left: no turn or mirroring leaves it as it is."""
    image = Image.new("RGB", (48, 32), "white")
    image.paste("black", (0, 0, 48, 16))
    image.paste("grey", (0, 0, 8, 32))
    return image


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_camera_was_held(tmp_path: Path, kind: str, orientation: int) -> None:
    undone = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    stored = halves() if undone is None else halves().transpose(undone)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a", kind, exif=exif)
    found = open_picture(tmp_path / "a").convert("RGB")
    assert found.size == (48, 32)
    assert np.abs(np.asarray(found, dtype=int) - np.asarray(halves(), dtype=int)).mean() < 5
    assert ImageOps.exif_transpose(found).size == found.size  # not to be turned twice


def test_damaged_exif_says_nothing(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x011A] = 6, "a camera", 72.0
    whole, numbers = exif.tobytes(), np.random.default_rng(0)
    for _ in range(300):
        content = bytearray(whole[: numbers.integers(7, len(whole) + 1)])
        for place in numbers.integers(6, len(content), 3):
            content[place] = numbers.integers(256)
        halves().save(tmp_path / "a", "JPEG", exif=bytes(content))
        assert sorted(open_picture(tmp_path / "a").size) == [32, 48]


def test_a_picture_of_a_phone_with_a_second_one_inside_is_its_first(tmp_path: Path) -> None:
    halves().save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[blocks()])
    with Image.open(tmp_path / "a.jpg") as opened:
        assert opened.format == "MPO"
    found = open_picture(tmp_path / "a.jpg")
    assert np.abs(np.asarray(found, dtype=int) - np.asarray(halves(), dtype=int)).mean() < 5


@pytest.mark.parametrize(
    ("size", "box"), [((60, 40), (0, 0, 48, 32)), ((20, 40), (16, 0, 32, 32)), ((480, 16), (0, 15, 48, 17))]
)
def test_a_picture_lies_whole_in_the_middle_of_a_white_page(
    size: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    page = on_white_page(Image.new("RGB", size, "black"), size=(48, 32))
    assert (page.size, page.mode) == ((48, 32), "RGB")
    assert ImageChops.invert(page).getbbox() == box
