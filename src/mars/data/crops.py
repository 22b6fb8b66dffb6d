"""Which part of a picture is encoded, and how large: crops, sizes and aspect buckets.

A bucket is a grid of about as many codes as the square one, with another aspect: of 64 codes 6x10, 7x9, 8x8, 9x7 and
10x6 (NovelAI 2022 proposed buckets for diffusion). All sizes of a picture show the same part of it, so that
super-resolution can learn from them.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Literal, get_args

from PIL import Image

from mars.errors import RequestError
from mars.picture import on_white_page

Crop = Literal["center", "random", "none"]
"""The middle; a place that the picture's key decides; or nothing is cut off, and the rest of the page is white."""
MAX_ASPECT = 2.0
"""Of a bucket: pictures that are longer are cut."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How pictures become images for an image tokenizer.

    Raises:
        RequestError: if codes of such a size are impossible.
    """

    factor: int
    """Pixels of a code on each side."""
    sizes: tuple[int, ...] = ()
    """Pixels on each side of a square image, or that many altogether in a bucket; none leaves pictures as they are."""
    crop: Crop = "center"
    aspect_buckets: bool = False

    def __post_init__(self) -> None:
        if self.crop not in get_args(Crop):
            raise RequestError(f"crop must be {', '.join(get_args(Crop))}, got {self.crop}")
        if not self.sizes and (self.crop != "center" or self.aspect_buckets):
            raise RequestError("pictures are cropped to a size, got none; give --size, or leave out crop and buckets")
        if len(set(self.sizes)) < len(self.sizes):
            raise RequestError(f"sizes must differ, got {', '.join(map(str, self.sizes))}")
        for size in self.sizes:
            if size < self.factor or size % self.factor:
                below = max(size // self.factor, 1) * self.factor
                raise RequestError(
                    f"size must be a multiple of {self.factor}, got {size}; near are {below} and {below + self.factor}"
                )
            if self.aspect_buckets and size % min(self.sizes):
                raise RequestError(
                    f"with aspect buckets, sizes must be multiples of the smallest, got {size} and {min(self.sizes)}"
                )

    def images(self, image: Image.Image, *, key: str) -> list[Image.Image]:
        """The picture at each size, RGB; the same for the same picture and key.

        Raises:
            RequestError: if it is to stay as it is, but has no whole number of codes.
        """
        if not self.sizes:
            if image.width % self.factor or image.height % self.factor:
                raise RequestError(
                    f"sides must be multiples of {self.factor}, got {image.width}x{image.height}; give --size"
                )
            return [image]
        base = min(self.sizes)
        side = base // self.factor
        rows, columns = nearest_bucket(side, aspect=image.width / image.height) if self.aspect_buckets else (side, side)
        box = None if self.crop == "none" else self._box(image, aspect=columns / rows, key=key)
        found = []
        for size in self.sizes:
            pixels = columns * self.factor * size // base, rows * self.factor * size // base
            if box is None:
                found.append(on_white_page(image, size=pixels))
            else:
                found.append(image.resize(pixels, Image.Resampling.LANCZOS, box=box))
        return found

    def _box(self, image: Image.Image, *, aspect: float, key: str) -> tuple[float, float, float, float]:
        """The largest part of this aspect: left, top, right, bottom in pixels, which need not be whole."""
        width = min(float(image.width), image.height * aspect)
        height = min(float(image.height), image.width / aspect)
        across = down = 0.5
        if self.crop == "random":
            digest = hashlib.sha256(key.encode()).digest()
            across, down = (int.from_bytes(digest[place : place + 6]) / 2**48 for place in (0, 6))
        left, top = across * (image.width - width), down * (image.height - height)
        return left, top, min(left + width, image.width), min(top + height, image.height)


def buckets(side: int) -> list[tuple[int, int]]:
    """Grids (rows, columns) of at most side x side codes, and of as many as fit, none longer than `MAX_ASPECT`."""
    wide = [(rows, side * side // rows) for rows in range(1, side + 1)]
    wide = [(rows, columns) for rows, columns in wide if columns / rows <= MAX_ASPECT]
    return sorted({*wide, *((columns, rows) for rows, columns in wide)})


def nearest_bucket(side: int, *, aspect: float) -> tuple[int, int]:
    """The bucket (rows, columns) that a picture of this width / height loses least in."""
    return min(buckets(side), key=lambda grid: abs(math.log(aspect * grid[0] / grid[1])))
