"""What a scene is, and how it is said in English and Chinese. Knows no pixels.

A `Scene` is the single source of its picture (`scenes.draw_scene`) and of its captions. Lengths are pixels; a box is
(left, top, right, bottom), right and bottom excluded.
"""

from dataclasses import dataclass
from typing import Literal

from mars.data.shards import Caption

Kind = Literal["single", "count", "pair", "line"]
Size = Literal["small", "medium", "large"]
Relation = Literal["left", "right", "above", "below"]
Box = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One shape; it touches all four sides of its box."""

    shape: str
    """A key of `ALL_SHAPES`."""
    colour: str
    """A key of `ALL_COLOURS`."""
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
MORE_SHAPES = {
    "pentagon": ShapeWords(plural="pentagons", chinese="五边形", measure="个"),
    "hexagon": ShapeWords(plural="hexagons", chinese="六边形", measure="个"),
    "octagon": ShapeWords(plural="octagons", chinese="八边形", measure="个"),
    "arrow": ShapeWords(plural="arrows", chinese="箭头", measure="个"),
    "trapezoid": ShapeWords(plural="trapezoids", chinese="梯形", measure="个"),
    "parallelogram": ShapeWords(plural="parallelograms", chinese="平行四边形", measure="个"),
    "kite": ShapeWords(plural="kites", chinese="风筝", measure="只"),
    "lightning bolt": ShapeWords(plural="lightning bolts", chinese="闪电", measure="道"),
    "house": ShapeWords(plural="houses", chinese="房子", measure="座"),
    "hourglass": ShapeWords(plural="hourglasses", chinese="沙漏", measure="个"),
    "bow tie": ShapeWords(plural="bow ties", chinese="领结", measure="个"),
    "chevron": ShapeWords(plural="chevrons", chinese="人字形", measure="个"),
    "crown": ShapeWords(plural="crowns", chinese="皇冠", measure="顶"),
    "frame": ShapeWords(plural="frames", chinese="方框", measure="个"),
    "flower": ShapeWords(plural="flowers", chinese="花朵", measure="朵"),
    "gear": ShapeWords(plural="gears", chinese="齿轮", measure="个"),
    "fir tree": ShapeWords(plural="fir trees", chinese="松树", measure="棵"),
    "staircase": ShapeWords(plural="staircases", chinese="楼梯", measure="个"),
    "shield": ShapeWords(plural="shields", chinese="盾牌", measure="面"),
    "arch": ShapeWords(plural="arches", chinese="拱门", measure="个"),
    "crescent": ShapeWords(plural="crescents", chinese="月牙", measure="个"),
    "teardrop": ShapeWords(plural="teardrops", chinese="水滴", measure="滴"),
}
MORE_COLOURS = {
    "cyan": (0, 190, 225),
    "navy": (25, 35, 105),
    "lime": (155, 220, 45),
    "teal": (0, 125, 125),
    "magenta": (225, 25, 160),
    "maroon": (125, 20, 45),
    "gold": (205, 160, 25),
    "olive": (115, 120, 25),
    "lavender": (190, 165, 240),
    "beige": (225, 205, 165),
    "turquoise": (65, 210, 185),
    "coral": (255, 115, 85),
    "azure": (60, 140, 240),
    "cobalt": (25, 75, 180),
    "sapphire": (30, 60, 160),
    "indigo": (75, 40, 170),
    "denim": (70, 105, 165),
    "slate": (95, 110, 130),
    "violet": (150, 80, 220),
    "plum": (120, 35, 120),
    "orchid": (200, 100, 210),
    "lilac": (205, 150, 215),
    "mauve": (175, 125, 160),
    "fuchsia": (245, 60, 190),
    "rose": (245, 105, 150),
    "blush": (250, 185, 200),
    "salmon": (250, 140, 120),
    "peach": (255, 195, 150),
    "apricot": (250, 175, 100),
    "crimson": (195, 20, 60),
    "scarlet": (240, 50, 25),
    "ruby": (165, 15, 50),
    "brick": (170, 65, 45),
    "rust": (185, 85, 30),
    "copper": (190, 115, 65),
    "bronze": (150, 110, 50),
    "caramel": (190, 130, 70),
    "chocolate": (85, 50, 30),
    "coffee": (110, 85, 65),
    "tan": (205, 170, 120),
    "khaki": (180, 170, 110),
    "mustard": (220, 180, 50),
    "amber": (255, 180, 0),
    "lemon": (250, 240, 90),
    "emerald": (20, 190, 110),
    "jade": (60, 150, 100),
    "mint": (150, 235, 190),
    "moss": (110, 140, 50),
    "pine": (20, 90, 60),
    "charcoal": (60, 62, 68),
}
"""Words that only training uses: the more shapes a colour is seen with, and the other way round, the less can a pair of
both be learned by heart."""
ALL_SHAPES = SHAPES | MORE_SHAPES
ALL_COLOURS = COLOURS | MORE_COLOURS
_CHINESE = (
    "红,橙,黄,绿,蓝,紫,粉,棕,黑,灰,青,藏青,黄绿,深青,品红,酒红,金,橄榄,淡紫,米,青绿,珊瑚,天蓝,钴蓝,宝蓝,靛,牛仔蓝,石板灰,紫罗兰,梅子,兰花,丁香,"
    "藕荷,紫红,玫瑰,浅粉,三文鱼,桃,杏,绯红,猩红,宝石红,砖红,铁锈,铜,青铜,焦糖,巧克力,咖啡,棕褐,卡其,芥末,琥珀,柠檬,祖母绿,玉,薄荷,苔藓,松柏,炭黑"
)
CHINESE_COLOURS = dict(zip(ALL_COLOURS, _CHINESE.split(","), strict=True))
_CHINESE_SIZES = {"small": "小", "medium": "", "large": "大"}
_CHINESE_SIDES = {"left": "左边", "right": "右边", "above": "上面", "below": "下面"}
_ENGLISH_NUMBERS = ("", "one", "two", "three", "four")
_CHINESE_NUMBERS = ("", "一", "两", "三", "四")


def english_name(item: SceneObject) -> str:
    """`large red circle`; a medium size is not named."""
    size = "" if item.size == "medium" else f"{item.size} "
    return f"{size}{item.colour} {item.shape}"


def _english_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _chinese_name(item: SceneObject) -> str:
    size = _CHINESE_SIZES[item.size]
    return f"{size and size + '的'}{CHINESE_COLOURS[item.colour]}色{ALL_SHAPES[item.shape].chinese}"


def _chinese_counted(item: SceneObject) -> str:
    return f"一{ALL_SHAPES[item.shape].measure}{_chinese_name(item)}"


def _english_captions(scene: Scene) -> tuple[str, str]:
    """The phrasing that is trained on, and the one that is not."""
    first = scene.objects[0]
    names = [_english_article(english_name(item)) for item in scene.objects]
    adjectives = first.colour if first.size == "medium" else f"{first.size} and {first.colour}"
    number = len(scene.objects)
    match scene.kind:
        case "single":
            return names[0], f"{_english_article(first.shape)} that is {adjectives}"
        case "count" if number == 1:
            return f"one {english_name(first)}", f"just one {first.shape}, which is {adjectives}"
        case "count":
            plural = ALL_SHAPES[first.shape].plural
            named = english_name(first).removesuffix(first.shape) + plural
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
    words = ALL_SHAPES[first.shape]
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
