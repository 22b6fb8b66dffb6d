"""Picture files: opening what users give, and saving what was drawn with the text that says how."""

import json
import struct
import warnings
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import IO, Any

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from mars.errors import ImageError

FORMATS = ("PNG", "JPEG", "MPO", "WEBP")
"""As PIL calls them; MPO are JPEG files of phones that hold a second picture, which is left aside."""
MIN_SIDE = 16
MAX_PIXELS = 64_000_000
DAMAGED = (ArithmeticError, AttributeError, LookupError, OSError, SyntaxError, TypeError, ValueError, struct.error)
"""What PIL raises for files that are not as they should be."""


class GeneratedImage(Image.Image):
    """A drawn picture: its prompt, seed, settings and model digest (also in `info`) go along into its file.

    PNG has them as text; in JPEG and WebP they are JSON in EXIF's UserComment, and EXIF's Software says who drew.
    """

    def __init__(self, pixels: Image.Image, text: dict[str, str]) -> None:
        super().__init__()
        self.im = pixels.im
        self._mode = pixels.mode
        self._size = pixels.size
        self.info.update(text)

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        """As `PIL.Image.Image.save`, with the text. Only PIL's own options pass through."""
        name = fp if isinstance(fp, str | Path) else getattr(fp, "name", "")
        kind = (format or Image.registered_extensions().get(Path(name).suffix.lower(), "")).upper()
        if kind == "PNG":
            text = PngInfo()
            for key, value in self.info.items():
                text.add_itxt(str(key), str(value))
            params.setdefault("pnginfo", text)
        elif kind in ("JPEG", "WEBP"):
            params.setdefault("exif", _exif(self.info))
        super().save(fp, format, **params)


def _exif(info: Mapping[Any, Any]) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = str(info.get("software", "mars-t2i"))
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"ASCII\0\0\0" + json.dumps(dict(info)).encode()
    return exif


def upright(image: Image.Image) -> Image.Image:
    """A copy, turned as EXIF says; EXIF that is damaged says nothing."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return ImageOps.exif_transpose(image)
    except DAMAGED:
        return image.copy()


def eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits scaled to 8, where PIL would cut it off at 255; anything else as it is."""
    if image.mode.startswith("I;16"):
        return image.point(lambda value: value * (1 / 257)).convert("L")
    return image


def open_picture(path: Path) -> Image.Image:
    """Reads a PNG, JPEG or WebP file whole, turned as its camera was held; errors are those of `read_picture`."""
    try:
        return read_picture(path, name=str(path))
    except (FileNotFoundError, IsADirectoryError):
        raise ImageError(f"no picture at {path}") from None


def read_picture(file: Path | IO[bytes], *, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads a PNG, JPEG or WebP picture whole, turned as its camera was held; `name` is for messages.

    Raises:
        ImageError: if it is no such picture, is damaged, or is too small or too large; sizes are looked at first.
        FileNotFoundError, IsADirectoryError: if there is no such file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of size, where ours is stricter, and of EXIF
            opened = Image.open(file)
        with closing(opened) as image:  # of its pixels, too, whoever holds the error
            if image.format not in FORMATS:
                raise ImageError(f"{name} must be PNG, JPEG or WebP, got {image.format}; convert it")
            width, height = image.size
            if min(width, height) < MIN_SIDE:
                raise ImageError(f"{name} must be at least {MIN_SIDE} pixels on each side, got {width}x{height}")
            if width * height > max_pixels:
                raise ImageError(f"{name} must have at most {max_pixels:,} pixels, got {width}x{height}; shrink it")
            image.load()
            return eight_bits(upright(image))
    except (FileNotFoundError, IsADirectoryError):
        raise
    except Image.DecompressionBombError:
        raise ImageError(f"{name} must have at most {max_pixels:,} pixels, got far more; shrink it") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not a picture; give a PNG, JPEG or WebP file") from None
    except DAMAGED as error:
        raise ImageError(f"{name} is damaged or cut short ({error}); make it again") from None


def on_white_page(image: Image.Image, *, size: tuple[int, int]) -> Image.Image:
    """The whole picture, as large as it fits, in the middle of a white RGB page of (width, height) pixels."""
    scale = min(size[0] / image.width, size[1] / image.height)
    inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    page = Image.new("RGB", size, "white")
    small = image.convert("RGBA").resize(inner, Image.Resampling.LANCZOS)
    page.paste(small, ((size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2), small)
    return page
