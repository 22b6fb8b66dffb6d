"""Picture files: opening what users give, and saving what was drawn with the text that says how."""

import struct
import warnings
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from mars.errors import ImageError

FORMATS = ("PNG", "JPEG", "MPO", "WEBP")
"""As PIL calls them; MPO are JPEG files of phones that hold a second picture, which is left aside."""
MIN_SIDE = 16
MAX_PIXELS = 64_000_000


class GeneratedImage(Image.Image):
    """A drawn picture. Saved as PNG it carries its prompt, seed, settings and model digest as text (also in `info`)."""

    def __init__(self, pixels: Image.Image, text: dict[str, str]) -> None:
        super().__init__()
        self.im = pixels.im
        self._mode = pixels.mode
        self._size = pixels.size
        self.info.update(text)

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        """As `PIL.Image.Image.save`, with the text in PNG files. Only PIL's own options pass through."""
        text = PngInfo()
        for key, value in self.info.items():
            text.add_itxt(str(key), str(value))
        params.setdefault("pnginfo", text)
        super().save(fp, format, **params)


def upright(image: Image.Image) -> Image.Image:
    """A copy, turned as EXIF says; EXIF that is damaged says nothing."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return ImageOps.exif_transpose(image)
    except (ArithmeticError, AttributeError, LookupError, OSError, SyntaxError, TypeError, ValueError, struct.error):
        return image.copy()


def eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits scaled to 8, where PIL would cut it off at 255; anything else as it is."""
    if image.mode.startswith("I;16"):
        return image.point(lambda value: value * (1 / 257)).convert("L")
    return image


def open_picture(path: Path) -> Image.Image:
    """Reads a PNG, JPEG or WebP picture whole, turned as its camera was held.

    Raises:
        ImageError: if the file is missing, is no such picture, is damaged, or is too small or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of size, where ours is stricter, and of EXIF
            opened = Image.open(path)
        with opened as image:
            if image.format not in FORMATS:
                raise ImageError(f"{path} must be PNG, JPEG or WebP, got {image.format}; convert it")
            width, height = image.size
            if min(width, height) < MIN_SIDE:
                raise ImageError(f"{path} must be at least {MIN_SIDE} pixels on each side, got {width}x{height}")
            if width * height > MAX_PIXELS:
                raise ImageError(f"{path} must have at most {MAX_PIXELS:,} pixels, got {width}x{height}; shrink it")
            image.load()
            return eight_bits(upright(image))
    except (FileNotFoundError, IsADirectoryError):
        raise ImageError(f"no picture at {path}") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{path} must have at most {MAX_PIXELS:,} pixels, got far more; shrink it") from None
    except UnidentifiedImageError:
        raise ImageError(f"{path} is not a picture; give a PNG, JPEG or WebP file") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"{path} is damaged or cut short ({error}); make it again") from None


def on_white_page(image: Image.Image, *, size: tuple[int, int]) -> Image.Image:
    """The whole picture, as large as it fits, in the middle of a white RGB page of (width, height) pixels."""
    scale = min(size[0] / image.width, size[1] / image.height)
    inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    page = Image.new("RGB", size, "white")
    small = image.convert("RGBA").resize(inner, Image.Resampling.LANCZOS)
    page.paste(small, ((size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2), small)
    return page
