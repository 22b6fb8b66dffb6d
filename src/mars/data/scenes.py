"""Composed scenes: simple shapes on white, drawn and described from one structured description.

They teach, and let evaluation measure, what a picture of one thing cannot show: counting, which colour
belongs to which shape, and where things stand. Words are in `scene_words`; some combinations never occur in training
(`scene_combinations`). Lengths are pixels; a box is (left, top, right, bottom), right and bottom excluded.
"""

import io
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from mars.data.scene_combinations import concept_of, split_of
from mars.data.scene_outlines import OUTLINES
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


def draw_scene(scene: Scene) -> Image.Image:
    """Draws the scene: an RGB image of `scene.size` by `scene.size` pixels."""
    side = scene.size * _SUPERSAMPLING
    image = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    for item in scene.objects:
        # Pillow counts the last pixel in.
        left, top = (edge * _SUPERSAMPLING for edge in item.box[:2])
        right, bottom = (edge * _SUPERSAMPLING - 1 for edge in item.box[2:])
        colour = ALL_COLOURS[item.colour].rgb
        if item.shape in OUTLINES:
            width, height = right - left, bottom - top
            corners = [(left + x * width, top + y * height) for x, y in OUTLINES[item.shape]]
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
