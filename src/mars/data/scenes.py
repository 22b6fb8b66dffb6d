"""Composed scenes: simple shapes on white, drawn and described from one structured description.

They teach, and let evaluation measure, what a picture of one thing cannot show: counting, which colour
belongs to which shape, and where things stand. A `Scene` is the single source of its pixels and of its
captions. Some combinations never occur in training (`split_of`), though all of their words do.
Lengths are pixels; a box is (left, top, right, bottom), right and bottom excluded.
"""

import hashlib
import io
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from PIL import Image, ImageDraw

from mars.data.shards import Caption, Picture, Record
from mars.errors import RequestError

Kind = Literal["single", "count", "pair", "line"]
Size = Literal["small", "medium", "large"]
Relation = Literal["left", "right", "above", "below"]
Box = tuple[int, int, int, int]
Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One shape; it touches all four sides of its box."""

    shape: str
    """A key of `SHAPES`."""
    colour: str
    """A key of `COLOURS`."""
    size: Size
    """`medium` is never named in a caption; in a line of three it is what fits."""
    box: Box


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A composition on a white square of `size` by `size` pixels; boxes never overlap."""

    kind: Kind
    """`single`; `count` (one to four of the same); `pair` (two different); `line` (three, in order)."""
    objects: tuple[SceneObject, ...]
    relation: Relation | None
    """Where the first object of a pair or line stands, seen from the next: `left` of it, `above` it, ..."""
    size: int


@dataclass(frozen=True, kw_only=True)
class ShapeWords:
    """What a shape is called; `measure` is its Chinese measure word."""

    plural: str
    chinese: str
    measure: str


SHAPES = {
    "circle": ShapeWords(plural="circles", chinese="圆形", measure="个"),
    "square": ShapeWords(plural="squares", chinese="正方形", measure="个"),
    "triangle": ShapeWords(plural="triangles", chinese="三角形", measure="个"),
    "star": ShapeWords(plural="stars", chinese="星星", measure="颗"),
    "heart": ShapeWords(plural="hearts", chinese="爱心", measure="颗"),
    "diamond": ShapeWords(plural="diamonds", chinese="菱形", measure="个"),
    "ring": ShapeWords(plural="rings", chinese="圆环", measure="个"),
    "cross": ShapeWords(plural="crosses", chinese="十字", measure="个"),
}
COLOURS = {
    "red": (222, 36, 36),
    "orange": (245, 140, 20),
    "yellow": (250, 215, 25),
    "green": (40, 165, 70),
    "blue": (35, 90, 220),
    "purple": (130, 50, 175),
    "pink": (250, 145, 190),
    "brown": (130, 78, 40),
    "black": (20, 20, 20),
    "gray": (140, 140, 140),
}
"""The exact RGB of every colour word."""
CHINESE_COLOURS = dict(zip(COLOURS, "红橙黄绿蓝紫粉棕黑灰", strict=True))
_CHINESE_SIZES = {"small": "小", "medium": "", "large": "大"}
_CHINESE_SIDES = {"left": "左边", "right": "右边", "above": "上面", "below": "下面"}
_ENGLISH_NUMBERS = ("", "one", "two", "three", "four")
_CHINESE_NUMBERS = ("", "一", "两", "三", "四")

# Parts of the picture's side. The ranges leave gaps, so that a size word is never a matter of opinion; at 128
# pixels the smallest shape is 24 pixels wide, one and a half patches.
_SIZES: dict[Size, Point] = {"small": (0.1875, 0.25), "medium": (0.34, 0.44), "large": (0.56, 0.68)}
_PAIR_SIZES: tuple[tuple[Size, Size], ...] = (
    ("medium", "medium"),
    ("small", "small"),
    ("small", "medium"),
    ("small", "large"),
)
_SIZE_IN_LINE = (0.26, 0.29)
_MARGIN = 1 / 64
_SUPERSAMPLING = 4
_HELD_OUT_PERCENT = 8
_HELD_OUT_SALT = "scenes: "
"""Chosen so that no shape and no colour loses much: of 8 x 10 pairs 5 are held out, of 112 triples 10."""


def _polygon(corners: list[Point]) -> list[Point]:
    """The polygon stretched to fill the unit square."""
    xs, ys = zip(*corners, strict=True)
    left, top, width, height = min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
    return [((x - left) / width, (y - top) / height) for x, y in corners]


def _star() -> list[Point]:
    radii = [1.0, 0.42] * 5
    return [(r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5)) for i, r in enumerate(radii)]


def _heart() -> list[Point]:
    # The well-known heart curve (Weisstein, "Heart Curve", MathWorld).
    angles = [math.tau * i / 48 for i in range(48)]
    ys = [2 * math.cos(3 * a) + math.cos(4 * a) + 5 * math.cos(2 * a) - 13 * math.cos(a) for a in angles]
    return [(16 * math.sin(a) ** 3, y) for a, y in zip(angles, ys, strict=True)]


_POLYGONS = {
    "square": _polygon([(0, 0), (1, 0), (1, 1), (0, 1)]),
    "triangle": _polygon([(1, 0), (2, 1), (0, 1)]),
    "star": _polygon(_star()),
    "heart": _polygon(_heart()),
    "diamond": _polygon([(1, 0), (2, 1), (1, 2), (0, 1)]),
    "cross": _polygon([(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1)]),
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
        colour = COLOURS[item.colour]
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


def _english_name(item: SceneObject) -> str:
    size = "" if item.size == "medium" else f"{item.size} "
    return f"{size}{item.colour} {item.shape}"


def _english_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _chinese_name(item: SceneObject) -> str:
    size = _CHINESE_SIZES[item.size]
    return f"{size and size + '的'}{CHINESE_COLOURS[item.colour]}色{SHAPES[item.shape].chinese}"


def _chinese_counted(item: SceneObject) -> str:
    return f"一{SHAPES[item.shape].measure}{_chinese_name(item)}"


def _english_captions(scene: Scene) -> tuple[str, str]:
    """The phrasing that is trained on, and the one that is not."""
    first = scene.objects[0]
    names = [_english_article(_english_name(item)) for item in scene.objects]
    adjectives = first.colour if first.size == "medium" else f"{first.size} and {first.colour}"
    number = len(scene.objects)
    match scene.kind:
        case "single":
            return names[0], f"{_english_article(first.shape)} that is {adjectives}"
        case "count" if number == 1:
            return f"one {_english_name(first)}", f"just one {first.shape}, which is {adjectives}"
        case "count":
            plural = SHAPES[first.shape].plural
            named = _english_name(first).removesuffix(first.shape) + plural
            them = "both" if number == 2 else "all"
            word = _ENGLISH_NUMBERS[number]
            return f"{word} {named}", f"{word} {plural}, {them} of them {adjectives}"
        case "pair":
            (one, two), side = names, scene.relation
            if side in ("left", "right"):
                return f"{one} to the {side} of {two}", f"{two} with {one} on its {side}"
            return f"{one} {side} {two}", f"{two} with {one} {side} it"
    one, two, three = names
    if scene.relation == "left":
        places, order = ("on the left", "on the right"), "from left to right"
    else:
        places, order = ("at the top", "at the bottom"), "from top to bottom"
    return f"{one}, {two} and {three} {order}", f"{places[0]} {one}, in the middle {two}, {places[1]} {three}"


def _chinese_captions(scene: Scene) -> tuple[str, str]:
    """The phrasing that is trained on, and the one that is not."""
    first = scene.objects[0]
    words = SHAPES[first.shape]
    colour, size = CHINESE_COLOURS[first.colour] + "色", _CHINESE_SIZES[first.size]
    number = len(scene.objects)
    match scene.kind:
        case "single":
            held_out = f"一{words.measure}{words.chinese}，颜色是{colour}" + (size and f"，尺寸很{size}")
            return _chinese_counted(first), held_out
        case "count":
            counted = f"{_CHINESE_NUMBERS[number]}{words.measure}"
            total = "只有" if number == 1 else "一共"
            return f"{counted}{_chinese_name(first)}", f"{colour}的{size}{words.chinese}，{total}{counted}"
        case "pair":
            assert scene.relation is not None
            side = _CHINESE_SIDES[scene.relation]
            other = _chinese_name(scene.objects[1])
            return f"{other}{side}有{_chinese_counted(first)}", f"{_chinese_name(first)}在{other}的{side}"
    one, two, three = (_chinese_counted(item) for item in scene.objects)
    start, end = ("左边", "右边") if scene.relation == "left" else ("上面", "下面")
    listed = f"从{start[0]}到{end[0]}依次是{one}、{two}和{three}"
    return listed, f"{start}是{one}，中间是{two}，{end}是{three}"


def captions_of(scene: Scene) -> tuple[Caption, ...]:
    """Two captions per language: kind `scene`, which is trained on, and kind `paraphrase`, which is not."""
    return tuple(
        Caption(text=text, language=language, kind=kind)
        for language, texts in (("en", _english_captions(scene)), ("zh", _chinese_captions(scene)))
        for kind, text in zip(("scene", "paraphrase"), texts, strict=True)
    )


def _in_order(scene: Scene) -> tuple[SceneObject, ...]:
    """The objects from left to right or from top to bottom."""
    return scene.objects[::-1] if scene.relation in ("right", "below") else scene.objects


def _order_word(scene: Scene) -> str:
    return "left of" if scene.relation in ("left", "right") else "above"


def concept_of(scene: Scene) -> str:
    """The canonical description: the same for the same things, whichever of a pair is named first."""
    if scene.kind in ("single", "count"):
        name = _english_name(scene.objects[0])
        return name if len(scene.objects) == 1 else f"{len(scene.objects)} x {name}"
    return f" {_order_word(scene)} ".join(_english_name(item) for item in _in_order(scene))


def combinations_of(scene: Scene) -> set[str]:
    """What is combined: `red circle` for every object, `circle left of square` (or `above`) for every two.

    A square right of a circle is that same combination. Two of one shape make none, since counts show them
    side by side anyway.
    """
    names = {f"{item.colour} {item.shape}" for item in scene.objects}
    if scene.relation is not None:
        pairs = combinations([item.shape for item in _in_order(scene)], 2)
        names |= {f"{one} {_order_word(scene)} {two}" for one, two in pairs if one != two}
    return names


def is_held_out(combination: str) -> bool:
    """Whether training never sees the combination: about 8 of 100, by its name alone and so for ever."""
    digest = hashlib.sha256((_HELD_OUT_SALT + combination).encode()).digest()
    return int.from_bytes(digest[:8]) % 100 < _HELD_OUT_PERCENT


def split_of(scene: Scene) -> str:
    """`combination` if the scene holds any held-out combination, else `train`."""
    return "combination" if any(map(is_held_out, combinations_of(scene))) else "train"


def _width(rng: random.Random, bounds: Point, size: int) -> int:
    return rng.randint(math.ceil(bounds[0] * size), math.floor(bounds[1] * size))


def _square(left: int, top: int, width: int) -> Box:
    return left, top, left + width, top + width


def _margin(size: int) -> int:
    return math.floor(_MARGIN * size)


def _boxes_apart(rng: random.Random, widths: list[int], size: int) -> list[Box]:
    """One anywhere in the picture, or each anywhere in a quarter of the picture of its own."""
    margin = _margin(size)
    cell = size if len(widths) == 1 else size // 2
    corners = [(0, 0)] if cell == size else [(0, 0), (cell, 0), (0, cell), (cell, cell)]
    boxes = []
    for (x, y), width in zip(rng.sample(corners, len(widths)), widths, strict=True):
        furthest = cell - margin - width
        boxes.append(_square(x + rng.randint(margin, furthest), y + rng.randint(margin, furthest), width))
    return boxes


def _row_boxes(rng: random.Random, widths: list[int], size: int) -> list[Box]:
    """One after another from left to right with a gap of two margins, their centres almost on one level."""
    margin = _margin(size)
    slack = size - sum(widths) - 2 * margin * len(widths)
    shifts = sorted(rng.randint(0, slack) for _ in widths)
    widest, jitter = max(widths), round(0.05 * size)
    level = rng.randint(margin + widest // 2, size - margin - (widest + 1) // 2)
    boxes = []
    left = margin
    for shift, width in zip(shifts, widths, strict=True):
        top = level - width // 2 + rng.randint(-jitter, jitter)
        boxes.append(_square(left + shift, min(max(top, margin), size - margin - width), width))
        left += width + 2 * margin
    return boxes


def _names(rng: random.Random, number: int) -> list[tuple[str, str]]:
    """Different (shape, colour) pairs."""
    return rng.sample([(shape, colour) for shape in SHAPES for colour in COLOURS], number)


def _same_things(rng: random.Random, kind: Kind, size: int) -> Scene:
    number = rng.randint(1, 4) if kind == "count" else 1
    [(shape, colour)] = _names(rng, 1)
    named = rng.choice(list(_SIZES) if kind == "single" else [each for each in _SIZES if each != "large"])
    widths = [_width(rng, _SIZES[named], size) for _ in range(number)]
    boxes = _boxes_apart(rng, widths, size)
    objects = tuple(SceneObject(shape=shape, colour=colour, size=named, box=box) for box in boxes)
    return Scene(kind=kind, objects=objects, relation=None, size=size)


def _different_things(rng: random.Random, kind: Kind, size: int) -> Scene:
    relations: list[Relation] = ["left", "above"] if kind == "line" else ["left", "right", "above", "below"]
    relation = rng.choice(relations)
    sizes: list[Size]
    if kind == "pair":
        sizes = rng.sample(rng.choice(_PAIR_SIZES), 2)
        widths = [_width(rng, _SIZES[each], size) for each in sizes]
    else:
        sizes = ["medium"] * 3
        widths = [_width(rng, _SIZE_IN_LINE, size) for _ in sizes]
    boxes = _row_boxes(rng, widths, size)
    if relation in ("above", "below"):
        boxes = [(top, left, bottom, right) for left, top, right, bottom in boxes]
    objects = [
        SceneObject(shape=shape, colour=colour, size=each, box=box)
        for (shape, colour), each, box in zip(_names(rng, len(sizes)), sizes, boxes, strict=True)
    ]
    if relation in ("right", "below"):
        objects.reverse()
    return Scene(kind=kind, objects=tuple(objects), relation=relation, size=size)


def make_scene(index: int, *, seed: int, size: int = 128) -> Scene:
    """The scene number `index` of a seed, whichever others are made.

    Raises:
        RequestError: if `size` is below 64 pixels.
    """
    if size < 64:
        raise RequestError(f"scenes must be at least 64 pixels wide, got {size}; ask for 128 or more")
    rng = random.Random(f"{seed}/{index}")
    kind: Kind = rng.choice(("single", "count", "pair", "line"))
    compose = _same_things if kind in ("single", "count") else _different_things
    return compose(rng, kind, size)


def make_scenes(*, count: int, seed: int, size: int = 128) -> Iterator[Picture]:
    """Draws `count` captioned scenes of `size` by `size` pixels; the same seed gives the same bytes.

    Picture `scene-000012` shows `make_scene(12, seed=seed, size=size)`.

    Raises:
        RequestError: if `size` is below 64 pixels.
    """
    for index in range(count):
        scene = make_scene(index, seed=seed, size=size)
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
