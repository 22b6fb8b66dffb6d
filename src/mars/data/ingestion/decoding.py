"""The bytes of somebody's picture file, to the form in which shards hold it, or the reason why they do not.

What is sound and says all by itself stays as it is, byte for byte. The rest becomes a PNG: other formats, the first of
several frames, a turn that EXIF asks for, transparency (on white), 16 bits, colours that are not RGB or grey.
"""

import io
import re
import warnings
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from mars.data.shards import Suffix
from mars.errors import ImageError
from mars.picture import MAX_PIXELS, MIN_SIDE, eight_bits, upright

MAX_BYTES = 1 << 28
"""Of a picture file."""
_KEPT: dict[str, Suffix] = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp"}
_READ = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""All that PIL may try; MPO are JPEG to it until it has looked inside."""
_MODES = {"1", "L", "P", "RGB", "RGBA"}
"""Modes that everything reads alike; the last only where nothing shows through."""
_BEGINNINGS = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF....WEBP|GIF8[79]a|BM|II\*\0|MM\0\*", re.DOTALL)
_ORIENTATION = 0x0112
_NORMAL = (None, 0, 1)
_PNG_DEPTH = 24
"""Where a PNG file says its bits per value."""


@dataclass(frozen=True, kw_only=True)
class StoredForm:
    """A picture file as shards hold it; width and height in pixels."""

    content: bytes
    suffix: Suffix
    width: int
    height: int


def stored_form(content: bytes) -> StoredForm:
    """Looks at every pixel of a picture file.

    Raises:
        ImageError: with the reason in a few words that begin with what is wrong, the same for the same bytes.
    """
    if not content:
        raise ImageError("empty file")
    if len(content) > MAX_BYTES:
        raise ImageError(f"too many bytes ({len(content):,}, at most {MAX_BYTES:,})")
    try:
        with warnings.catch_warnings(action="ignore"):  # of sizes, where ours is stricter, and of metadata
            image = Image.open(io.BytesIO(content), formats=_READ)
            _refuse_size(image.size)
            if image.format == "PNG":  # whose sums are not looked at when it is decoded
                Image.open(io.BytesIO(content), formats=_READ).verify()
            return _converted(image, content=content)
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(f"too many pixels (at most {MAX_PIXELS:,})") from None
    except UnidentifiedImageError:
        if _BEGINNINGS.match(content):
            raise ImageError("damaged (its header cannot be read)") from None
        raise ImageError(f"not a picture of a kind that is read ({', '.join(_READ)})") from None
    except MemoryError:
        raise ImageError("too large for the memory of this machine") from None
    except Exception as error:  # whatever a decoder stumbles over in bytes of strangers
        raise ImageError(f"damaged ({_words(error)})") from error


def _refuse_size(size: tuple[int, int]) -> None:
    """Before anything is decoded."""
    width, height = size
    if width * height > MAX_PIXELS:
        raise ImageError(f"too many pixels ({width}x{height}, at most {MAX_PIXELS:,})")
    if min(size) < MIN_SIDE:
        raise ImageError(f"too small ({width}x{height}, at least {MIN_SIDE} on each side)")


def _converted(image: Image.Image, *, content: bytes) -> StoredForm:
    kind = image.format or ""
    several = kind != "MPO" and getattr(image, "n_frames", 1) > 1
    image.load()
    turned = _orientation(image) not in _NORMAL
    deep = kind == "PNG" and content[_PNG_DEPTH] == 16
    see_through = _is_seen_through(image)
    if kind in _KEPT and image.mode in _MODES and not (several or turned or deep or see_through):
        return StoredForm(content=content, suffix=_KEPT[kind], width=image.width, height=image.height)
    if image.mode in ("I", "F"):
        raise ImageError(f"unbounded pixel values ({image.mode}, 32 bits)")
    image = eight_bits(upright(image))
    if see_through:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    if image.mode != "L":
        image = image.convert("RGB")
    for name in [*image.info]:  # of a file that this one no longer is
        del image.info[name]
    png = io.BytesIO()
    image.save(png, "PNG")
    return StoredForm(content=png.getvalue(), suffix="png", width=image.width, height=image.height)


def _orientation(image: Image.Image) -> object:
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # EXIF that is damaged says nothing
        return None


def _is_seen_through(image: Image.Image) -> bool:
    if not image.has_transparency_data:
        return False
    lowest, _ = image.convert("RGBA").getchannel("A").getextrema()
    return lowest < 255  # type: ignore[operator] # of one band


def _words(error: Exception) -> str:
    """An error's message without what differs from run to run."""
    text = re.sub(r"<[^>]*>|0x[0-9a-f]+", "", str(error))
    return " ".join(text.split())[:200] or type(error).__name__
