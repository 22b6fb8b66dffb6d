"""Composed scenes: simple shapes on white, drawn and described from one structured description.

They teach, and let evaluation measure, what a picture of one thing cannot show: counting, which colour
belongs to which shape, and where things stand. Words are in `scene_words`; some combinations never occur in training
(`scene_combinations`). Lengths are pixels; a box is (left, top, right, bottom), right and bottom excluded.
"""

import io
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from mars.data.scene_combinations import concept_of, split_of
from mars.data.scene_words import (
    ALL_COLOURS,
    ALL_SHAPES,
    COLOURS,
    SHAPES,
    Box,
    Kind,
    Relation,
    Scene,
    SceneObject,
    Size,
    captions_of,
)
from mars.data.shards import Picture, Record
from mars.errors import RequestError

Point = tuple[float, float]

GRID = 16
"""Things stand on a grid of so many places, which at 128 pixels is that of the shipped image tokenizer's codes: a shape
is then told by the same codes wherever it stands."""
KINDS: tuple[Kind, ...] = ("single", "count", "pair", "line")
SPACINGS = (1, 2)
"""Corners of things stand on every place, or on every second, half a cell of the shipped model (2 by 2 places) from
where the cells begin: a shape is then told by the same cells too, wherever it stands."""
# Widths in places, the least first. They leave gaps, so that a size word is never a matter of opinion; at 128 pixels
# the smallest shape is 24 pixels wide.
_SIZES: dict[Size, tuple[int, ...]] = {"small": (3, 4), "medium": (6, 7), "large": (9, 10)}
_PAIR_SIZES: tuple[tuple[Size, Size], ...] = (
    ("medium", "medium"),
    ("small", "small"),
    ("small", "medium"),
    ("small", "large"),
)
_WIDTHS_IN_LINE = {1: (4,), 2: (3,)}
"""For each spacing."""
_SUPERSAMPLING = 4


def _polygon(corners: list[Point]) -> list[Point]:
    """The polygon stretched to fill the unit square."""
    xs, ys = zip(*corners, strict=True)
    left, top, width, height = min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
    return [((x - left) / width, (y - top) / height) for x, y in corners]


def _regular(corners: int) -> list[Point]:
    angles = [math.tau * i / corners for i in range(corners)]
    return [(math.sin(angle), -math.cos(angle)) for angle in angles]


def _star() -> list[Point]:
    radii = [1.0, 0.42] * 5
    return [(r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5)) for i, r in enumerate(radii)]


def _heart() -> list[Point]:
    # The well-known heart curve (Weisstein, "Heart Curve", MathWorld).
    angles = [math.tau * i / 48 for i in range(48)]
    ys = [2 * math.cos(3 * a) + math.cos(4 * a) + 5 * math.cos(2 * a) - 13 * math.cos(a) for a in angles]
    return [(16 * math.sin(a) ** 3, y) for a, y in zip(angles, ys, strict=True)]


def _angles(start: float, end: float) -> list[float]:
    return [start + (end - start) * i / 24 for i in range(25)]


def _polar(radius: Callable[[float], float]) -> list[Point]:
    """A closed curve by its distance from the middle."""
    angles = [math.tau * i / 96 for i in range(96)]
    return [(radius(angle) * math.sin(angle), -radius(angle) * math.cos(angle)) for angle in angles]


def _bow(radius: float, direction: int) -> list[Point]:
    """Half a circle above (3, 3), from left to right (1) or from right to left (-1)."""
    return [(3 - direction * radius * math.cos(angle), 3 - radius * math.sin(angle)) for angle in _angles(0, math.pi)]


def _crescent() -> list[Point]:
    """Between two circles that meet at the two ends."""
    outer = [(-math.cos(angle), math.sin(angle)) for angle in _angles(-1.9, 1.9)]
    inner = [(0.7 - 1.019 * math.cos(angle), 1.019 * math.sin(angle)) for angle in _angles(1.189, -1.189)]
    return outer + inner


_POLYGONS = {
    "square": _polygon([(0, 0), (1, 0), (1, 1), (0, 1)]),
    "triangle": _polygon([(1, 0), (2, 1), (0, 1)]),
    "star": _polygon(_star()),
    "heart": _polygon(_heart()),
    "diamond": _polygon([(1, 0), (2, 1), (1, 2), (0, 1)]),
    "cross": _polygon([(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1)]),
    "pentagon": _polygon(_regular(5)),
    "hexagon": _polygon(_regular(6)),
    "octagon": _polygon(_regular(8)),
    "arrow": _polygon([(3, 0), (6, 3), (4, 3), (4, 6), (2, 6), (2, 3), (0, 3)]),
    "trapezoid": _polygon([(1, 0), (3, 0), (4, 4), (0, 4)]),
    "parallelogram": _polygon([(2, 0), (6, 0), (4, 4), (0, 4)]),
    "kite": _polygon([(2, 0), (4, 2), (2, 6), (0, 2)]),
    "lightning bolt": _polygon([(4, 0), (8, 0), (5, 4), (8, 4), (0, 10), (3, 5), (0, 5)]),
    "house": _polygon([(3, 0), (6, 3), (5, 3), (5, 6), (1, 6), (1, 3), (0, 3)]),
    "hourglass": _polygon([(0, 0), (6, 0), (3.5, 3), (6, 6), (0, 6), (2.5, 3)]),
    "bow tie": _polygon([(0, 0), (3, 2.5), (6, 0), (6, 6), (3, 3.5), (0, 6)]),
    "chevron": _polygon([(3, 0), (6, 3), (6, 6), (3, 3), (0, 6), (0, 3)]),
    "crown": _polygon([(0, 0), (1.5, 3), (3, 0), (4.5, 3), (6, 0), (6, 6), (0, 6)]),
    "frame": _polygon([(0, 0), (4, 0), (4, 4), (0, 4), (0, 0), (1, 1), (1, 3), (3, 3), (3, 1), (1, 1)]),
    "flower": _polygon(_polar(lambda angle: 1 + 0.3 * math.cos(5 * angle))),
    "gear": _polygon(_polar(lambda angle: 1.2 if math.cos(8 * angle) > 0 else 0.85)),
    "fir tree": _polygon(
        [(3, 0), (5, 2.5), (4, 2.5), (6, 5), (3.6, 5), (3.6, 6), (2.4, 6), (2.4, 5), (0, 5), (2, 2.5), (1, 2.5)]
    ),
    "staircase": _polygon([(0, 0), (2, 0), (2, 2), (4, 2), (4, 4), (6, 4), (6, 6), (0, 6)]),
    "shield": _polygon([(0, 0), (6, 0), (6, 3), (5, 5), (3, 6), (1, 5), (0, 3)]),
    "arch": _polygon([(0, 6), *_bow(3, 1), (6, 6), (4, 6), *_bow(1.2, -1), (2, 6)]),
    "crescent": _polygon(_crescent()),
    "teardrop": _polygon([(3, 0), *((3 + 2 * math.cos(a), 4 + 2 * math.sin(a)) for a in _angles(-0.5, math.pi + 0.5))]),
}


def draw_scene(scene: Scene) -> Image.Image:
    """Draws the scene: an RGB image of `scene.size` by `scene.size` pixels."""
    side = scene.size * _SUPERSAMPLING
    image = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    for item in scene.objects:
        # Pillow counts the last pixel in.
        left, top = (edge * _SUPERSAMPLING for edge in item.box[:2])
        right, bottom = (edge * _SUPERSAMPLING - 1 for edge in item.box[2:])
        colour = ALL_COLOURS[item.colour]
        if item.shape in _POLYGONS:
            width, height = right - left, bottom - top
            corners = [(left + x * width, top + y * height) for x, y in _POLYGONS[item.shape]]
            draw.polygon(corners, fill=colour)
        else:
            draw.ellipse((left, top, right, bottom), fill=colour)
        if item.shape == "ring":
            wall = (right - left) // 4
            draw.ellipse((left + wall, top + wall, right - wall, bottom - wall), fill="white")
    return image.reduce(_SUPERSAMPLING)


def _box(left: int, top: int, width: int, *, size: int) -> Box:
    """The pixels of a square of places."""
    x, y, side = (round(places * size / GRID) for places in (left, top, width))
    return x, y, x + side, y + side


def _widths(widths: tuple[int, ...], spacing: int) -> tuple[int, ...]:
    """Things that stand on every second place have one width for each size."""
    return widths if spacing == 1 else widths[:1]


def _boxes_apart(rng: random.Random, named: Size, number: int, *, size: int, spacing: int) -> list[Box]:
    """One anywhere in the picture, or each anywhere in a quarter of the picture of its own; a free place around it."""
    cell = GRID if number == 1 else GRID // 2
    corners = [(0, 0)] if number == 1 else [(0, 0), (cell, 0), (0, cell), (cell, cell)]
    boxes = []
    for x, y in rng.sample(corners, number):
        width = rng.choice([one for one in _widths(_SIZES[named], spacing) if one <= cell - 2])
        left, top = (1 + spacing * rng.randint(0, (cell - 2 - width) // spacing) for _ in range(2))
        boxes.append(_box(x + left, y + top, width, size=size))
    return boxes


def _row_boxes(rng: random.Random, sizes: list[tuple[int, ...]], *, size: int, spacing: int) -> list[Box]:
    """One after another from left to right with a free place around each, their centres almost on one level.

    Args:
        sizes: of each, the widths to choose from.
    """
    slack = -1
    while slack < 0:
        widths = [rng.choice(_widths(some, spacing)) for some in sizes]
        taken = [-(-(width + 1) // spacing) * spacing for width in widths]
        slack = GRID - 1 - sum(taken[:-1]) - (widths[-1] + 1)
    shifts = sorted(spacing * rng.randint(0, slack // spacing) for _ in widths)
    level = rng.randint(1 + max(widths) // 2, GRID - 1 - (max(widths) + 1) // 2)
    boxes = []
    left = 1
    for shift, width, step in zip(shifts, widths, taken, strict=True):
        top = level - width // 2
        boxes.append(_box(left + shift, top - (top - 1) % spacing, width, size=size))
        left += step
    return boxes


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What scenes are composed of. Lengths are pixels."""

    size: int
    spacing: int
    rich: bool
    """Whether half of the scenes may have all shapes, and half of them all colours."""

    def names(self, rng: random.Random, number: int) -> list[tuple[str, str]]:
        """Different (shape, colour) pairs."""
        shapes = ALL_SHAPES if self.rich and rng.random() < 0.5 else SHAPES
        colours = ALL_COLOURS if self.rich and rng.random() < 0.5 else COLOURS
        return rng.sample([(shape, colour) for shape in shapes for colour in colours], number)


def _same_things(rng: random.Random, kind: Kind, plan: _Plan) -> Scene:
    number = rng.randint(1, 4) if kind == "count" else 1
    [(shape, colour)] = plan.names(rng, 1)
    named = rng.choice(list(_SIZES) if kind == "single" else [each for each in _SIZES if each != "large"])
    boxes = _boxes_apart(rng, named, number, size=plan.size, spacing=plan.spacing)
    objects = tuple(SceneObject(shape=shape, colour=colour, size=named, box=box) for box in boxes)
    return Scene(kind=kind, objects=objects, relation=None, size=plan.size)


def _different_things(rng: random.Random, kind: Kind, plan: _Plan) -> Scene:
    relations: list[Relation] = ["left", "above"] if kind == "line" else ["left", "right", "above", "below"]
    relation = rng.choice(relations)
    sizes: list[Size]
    if kind == "pair":
        sizes = rng.sample(rng.choice(_PAIR_SIZES), 2)
        widths = [_SIZES[each] for each in sizes]
    else:
        sizes = ["medium"] * 3
        widths = [_WIDTHS_IN_LINE[plan.spacing]] * 3
    boxes = _row_boxes(rng, widths, size=plan.size, spacing=plan.spacing)
    if relation in ("above", "below"):
        boxes = [(top, left, bottom, right) for left, top, right, bottom in boxes]
    objects = [
        SceneObject(shape=shape, colour=colour, size=each, box=box)
        for (shape, colour), each, box in zip(plan.names(rng, len(sizes)), sizes, boxes, strict=True)
    ]
    if relation in ("right", "below"):
        objects.reverse()
    return Scene(kind=kind, objects=tuple(objects), relation=relation, size=plan.size)


def make_scene(
    index: int,
    *,
    seed: int,
    size: int = 128,
    spacing: int = 1,
    rich: bool = False,
    kinds: Sequence[Kind] = KINDS,
) -> Scene:
    """The scene number `index` of a seed, whichever others are made.

    Args:
        spacing: one of `SPACINGS`.
        rich: whether half of the scenes may have all shapes, and half of them all colours, training's too.
        kinds: each as likely; twice if it is named twice.

    Raises:
        RequestError: if `size` is below 64 pixels, or for another spacing or kind.
    """
    if size < 64:
        raise RequestError(f"scenes must be at least 64 pixels wide, got {size}; ask for 128 or more")
    if spacing not in SPACINGS:
        raise RequestError(f"the spacing of scenes must be 1 or 2 places, got {spacing}")
    if not kinds or not set(kinds) <= set(KINDS):
        raise RequestError(f"kinds of scenes must be some of {', '.join(KINDS)}, got {', '.join(kinds) or 'none'}")
    rng = random.Random(f"{seed}/{index}")
    kind = rng.choice(tuple(kinds))
    compose = _same_things if kind in ("single", "count") else _different_things
    return compose(rng, kind, _Plan(size=size, spacing=spacing, rich=rich))


def make_scenes(
    *,
    count: int,
    seed: int,
    size: int = 128,
    spacing: int = 1,
    rich: bool = False,
    kinds: Sequence[Kind] = KINDS,
) -> Iterator[Picture]:
    """Draws `count` captioned scenes of `size` by `size` pixels; the same seed gives the same bytes.

    Picture `scene-000012` shows `make_scene(12, ...)` of the same arguments.

    Raises:
        RequestError: as `make_scene`.
    """
    for index in range(count):
        scene = make_scene(index, seed=seed, size=size, spacing=spacing, rich=rich, kinds=kinds)
        png = io.BytesIO()
        draw_scene(scene).save(png, "PNG")
        record = Record(
            key=f"scene-{index:06d}",
            concept=concept_of(scene),
            style="scene",
            split=split_of(scene),
            source="scenes",
            licence="CC0-1.0",
            captions=captions_of(scene),
            width=size,
            height=size,
        )
        yield Picture(record=record, content=png.getvalue())
