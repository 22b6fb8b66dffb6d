"""What stands in a picture of a scene: an analytic detector, no model. It knows pictures and the words of scenes.

    picture -> ink (what is not white) -> connected pieces -> shape by overlap with the eight, colour of its inside

A piece that is no clear shape or no clear colour is found all the same, as `None`: a picture with it shows something
that nobody asked for. Shares are of the picture's side or area.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from mars.data.scene_words import COLOURS, SHAPES, Scene, SceneObject
from mars.data.scenes import draw_scene

INK = 48
"""How far the darkest channel must be from white (0..255); the palest colour, pink, is 110 away."""
SPECK = 0.0035
"""A smaller piece (share of the area) is noise of the image tokenizer; the smallest shape, a small star, has 0.010."""
OVERLAP = 0.72
"""Least intersection over union with a shape in the same box; a circle and a square have 0.79, a ring 0.74."""
SQUARENESS = 0.75
"""Least ratio of the sides of a piece's box; shapes are as wide as they are high."""
LARGEST = 0.8
"""A wider piece (share of the side) is a background."""
NEAR = 90.0
"""Farthest that a piece's median colour may be from the word's (RGB, 0..255)."""
UNIFORM = 0.5
"""Least share of a piece's inside that is nearest to its colour's word."""
SIDE = 32
"""Pixels on each side of the box in which shapes are compared."""
BLURS = (0.0, 0.05, 0.1)
"""Widths of the blurs (standard deviation, as a share of a shape's width) that shapes are compared after."""

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Found:
    """A thing in a picture."""

    shape: str | None
    """A key of `SHAPES`; None if it is none of them."""
    colour: str | None
    """A key of `COLOURS`; None if it has no clear one."""
    width: float
    """The larger side of its box, as a share of the picture's."""
    centre: tuple[float, float]
    """Of its box, from the left and from the top, 0..1."""


def found_in(scene: Scene) -> list[Found]:
    """What a perfect detector would find in the scene's picture."""
    return [
        Found(
            shape=item.shape,
            colour=item.colour,
            width=(item.box[2] - item.box[0]) / scene.size,
            centre=((item.box[0] + item.box[2]) / 2 / scene.size, (item.box[1] + item.box[3]) / 2 / scene.size),
        )
        for item in scene.objects
    ]


def detect(image: Image.Image) -> list[Found]:
    """The things in a picture, from the top left on."""
    pixels = np.asarray(image.convert("RGB"))
    ink = 255.0 - pixels.min(axis=2)
    found = [_describe(pixels, piece) for rough in _pieces(ink > INK) for piece in _pieces(_sharp(ink, rough))]
    return sorted(found, key=lambda one: (one.centre[1], one.centre[0]))


def _pieces(ink: Mask) -> list[Mask]:
    """Connected pieces (four neighbours) that are no specks: each takes the largest number of any of its pixels."""
    numbers = np.arange(1, ink.size + 1).reshape(ink.shape) * ink
    while True:
        spread = _along_rows(_along_rows(numbers, ink).T, ink.T).T
        if np.array_equal(spread, numbers):
            break
        numbers = spread
    found, counts = np.unique(numbers[ink], return_counts=True)
    return [numbers == number for number in found[counts >= SPECK * ink.size]]


def _along_rows(numbers: npt.NDArray[np.int64], ink: Mask) -> npt.NDArray[np.int64]:
    """Each run of ink in a row takes its largest number: a running maximum that each new run outbids."""
    runs = np.cumsum(~ink, axis=1) * (numbers.size + 1)
    forward = np.maximum.accumulate(numbers + runs, axis=1) - runs
    runs = runs[:, -1:] - runs
    largest: npt.NDArray[np.int64] = np.maximum.accumulate((forward + runs)[:, ::-1], axis=1)[:, ::-1] - runs
    return np.where(ink, largest, 0)


def _sharp(ink: npt.NDArray[np.float64], rough: Mask) -> Mask:
    """Of a rough piece what has half of its own ink: a dark thing's blurred edge is as dark as a pale thing."""
    full = np.quantile(ink[rough], 0.75)
    return rough & (ink > full / 2)


def _describe(pixels: Pixels, piece: Mask) -> Found:
    top, bottom, left, right = _box(piece)
    height, width = bottom - top, right - left
    share = max(height / piece.shape[0], width / piece.shape[1])
    possible = min(height, width) >= SQUARENESS * max(height, width) and share <= LARGEST
    return Found(
        shape=_shape(piece) if possible else None,
        colour=_colour(pixels, piece),
        width=share,
        centre=((left + right) / 2 / piece.shape[1], (top + bottom) / 2 / piece.shape[0]),
    )


@cache
def _shapes() -> tuple[tuple[str, Mask], ...]:
    """Each shape as it fills a box of `SIDE` by `SIDE` pixels, sharp and as image tokenizers round its corners."""
    size, margin = 8 * SIDE, 2 * SIDE
    masks = []
    for shape in SHAPES:
        item = SceneObject(
            shape=shape, colour="black", size="large", box=(margin, margin, size - margin, size - margin)
        )
        picture = draw_scene(Scene(kind="single", objects=(item,), relation=None, size=size)).convert("L")
        for blur in BLURS:
            seen = picture.filter(ImageFilter.GaussianBlur(blur * (size - 2 * margin)))
            masks.append((shape, _scaled(np.asarray(seen) < 128)))
    return tuple(masks)


def _scaled(piece: Mask) -> Mask:
    """A piece cut out at its box, which becomes `SIDE` by `SIDE` pixels."""
    top, bottom, left, right = _box(piece)
    cut = Image.fromarray(piece[top:bottom, left:right].astype(np.uint8) * 255)
    return np.asarray(cut.resize((SIDE, SIDE), Image.Resampling.BILINEAR)) >= 128


def _box(piece: Mask) -> tuple[int, int, int, int]:
    """Top, bottom, left, right; bottom and right excluded."""
    rows, columns = np.flatnonzero(piece.any(axis=1)), np.flatnonzero(piece.any(axis=0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def _shape(piece: Mask) -> str | None:
    """The shape that a piece overlaps most."""
    mask = _scaled(piece)
    overlap, best = max((float((mask & true).sum() / (mask | true).sum()), shape) for shape, true in _shapes())
    return best if overlap >= OVERLAP else None


def _colour(pixels: Pixels, piece: Mask) -> str | None:
    """The word nearest to the median colour of a piece's inside, which its blurred edge does not belong to."""
    padded = np.pad(piece, 1)
    inside = piece & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    colours = pixels[inside if inside.sum() >= piece.sum() / 4 else piece].astype(np.float64)
    words = np.array([colour.rgb for colour in COLOURS.values()], dtype=np.float64)
    median = np.median(colours, axis=0)
    distances = np.linalg.norm(words - median, axis=1)
    nearest = int(distances.argmin())
    share = (np.linalg.norm(colours[:, None] - words, axis=2).argmin(axis=1) == nearest).mean()
    return list(COLOURS)[nearest] if distances[nearest] <= NEAR and share >= UNIFORM else None
