"""Pictures of requests and answers: bytes and data URLs to PIL, and back with what says how they were drawn."""

import base64
import binascii
import io
import re
from typing import Literal

import anyio
from PIL import Image

from mars.picture import GeneratedImage, on_white_page, read_picture
from mars.pipeline.editing import on_black_page, read_mask
from mars.server.errors import ApiError
from mars.server.settings import Limits

Format = Literal["png", "jpeg", "webp"]

_reading = anyio.CapacityLimiter(2)
"""Pictures that are read at once: each may take hundreds of megabytes for a moment."""
_DATA_URL = re.compile(r"data:image/(?:png|jpeg|jpg|webp);base64,")


async def read(content: bytes, *, limits: Limits, param: str) -> Image.Image:
    """A picture that was sent; ImageError if it is none."""
    return await anyio.to_thread.run_sync(
        lambda: read_picture(io.BytesIO(content), name=param, max_pixels=limits.pixels), limiter=_reading
    )


async def read_page(content: bytes, *, size: tuple[int, int], limits: Limits, param: str) -> Image.Image:
    """A picture on a white page of the model's size, so that a request that waits holds no more than that."""
    return await anyio.to_thread.run_sync(
        lambda: on_white_page(read_picture(io.BytesIO(content), name=param, max_pixels=limits.pixels), size=size),
        limiter=_reading,
    )


async def read_with_mask(
    content: bytes, mask: bytes | None, *, size: tuple[int, int], limits: Limits
) -> tuple[Image.Image, Image.Image]:
    """A picture and its mask on pages of the model's size.

    Without a mask the picture's own transparency is it. Raises ImageError or RequestError if one cannot be used.
    """

    def work() -> tuple[Image.Image, Image.Image]:
        picture = read_picture(io.BytesIO(content), name="image", max_pixels=limits.pixels)
        if mask is not None:
            given = read_picture(io.BytesIO(mask), name="mask", max_pixels=limits.pixels)
        elif picture.has_transparency_data and picture.convert("RGBA").getchannel("A").getextrema()[0] < 128:  # type: ignore[operator]
            given = picture.convert("RGBA")
        else:
            raise ApiError(
                400, "an edit needs a mask, or an image that is transparent where it is drawn anew", param="mask"
            )
        hole = read_mask(given, size=picture.size)
        return on_white_page(picture, size=size), on_black_page(hole, size=size)

    return await anyio.to_thread.run_sync(work, limiter=_reading)


def from_data_url(url: str, *, param: str) -> bytes:
    """The bytes of a picture in a data URL; others are refused, as the server fetches nothing."""
    found = _DATA_URL.match(url)
    if found is None:
        raise ApiError(
            400, "an image must be a data URL of a PNG, JPEG or WebP picture in base64; the server fetches nothing",
            param=param,
        )  # fmt: skip
    try:
        return base64.b64decode(url[found.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, "an image's data URL must be valid base64", param=param) from None


def _encode(image: Image.Image, kind: Format, quality: int) -> str:
    file = io.BytesIO()
    if kind == "png":
        image.save(file, format="PNG")
    else:
        image.save(file, format=kind.upper(), quality=quality)
    return base64.b64encode(file.getvalue()).decode("ascii")


async def encode(image: Image.Image, kind: Format, *, quality: int = 100) -> str:
    """A picture's file in base64; a drawn one carries its prompt, seed, settings and digests."""
    return await anyio.to_thread.run_sync(_encode, image, kind, quality)


async def data_url(image: GeneratedImage) -> str:
    """A drawn picture as the data URL of a PNG file."""
    return f"data:image/png;base64,{await encode(image, 'png')}"
