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
OPPOSITE: dict[Relation, Relation] = {"left": "right", "right": "left", "above": "below", "below": "above"}


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


@dataclass(frozen=True, kw_only=True)
class ColourWords:
    """What a colour is: its exact RGB, and its Chinese name, after which 色 stands."""

    rgb: tuple[int, int, int]
    chinese: str


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
    "red": ColourWords(rgb=(222, 36, 36), chinese="红"),
    "orange": ColourWords(rgb=(245, 140, 20), chinese="橙"),
    "yellow": ColourWords(rgb=(250, 215, 25), chinese="黄"),
    "green": ColourWords(rgb=(40, 165, 70), chinese="绿"),
    "blue": ColourWords(rgb=(35, 90, 220), chinese="蓝"),
    "purple": ColourWords(rgb=(130, 50, 175), chinese="紫"),
    "pink": ColourWords(rgb=(250, 145, 190), chinese="粉"),
    "brown": ColourWords(rgb=(130, 78, 40), chinese="棕"),
    "black": ColourWords(rgb=(20, 20, 20), chinese="黑"),
    "gray": ColourWords(rgb=(140, 140, 140), chinese="灰"),
}
"""The colours that the bench asks for."""
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
    "cyan": ColourWords(rgb=(0, 190, 225), chinese="青"),
    "navy": ColourWords(rgb=(25, 35, 105), chinese="藏青"),
    "lime": ColourWords(rgb=(155, 220, 45), chinese="黄绿"),
    "teal": ColourWords(rgb=(0, 125, 125), chinese="深青"),
    "magenta": ColourWords(rgb=(225, 25, 160), chinese="品红"),
    "maroon": ColourWords(rgb=(125, 20, 45), chinese="酒红"),
    "gold": ColourWords(rgb=(205, 160, 25), chinese="金"),
    "olive": ColourWords(rgb=(115, 120, 25), chinese="橄榄"),
    "lavender": ColourWords(rgb=(190, 165, 240), chinese="淡紫"),
    "beige": ColourWords(rgb=(225, 205, 165), chinese="米"),
    "turquoise": ColourWords(rgb=(65, 210, 185), chinese="青绿"),
    "coral": ColourWords(rgb=(255, 115, 85), chinese="珊瑚"),
    "azure": ColourWords(rgb=(60, 140, 240), chinese="天蓝"),
    "cobalt": ColourWords(rgb=(25, 75, 180), chinese="钴蓝"),
    "sapphire": ColourWords(rgb=(30, 60, 160), chinese="宝蓝"),
    "indigo": ColourWords(rgb=(75, 40, 170), chinese="靛"),
    "denim": ColourWords(rgb=(70, 105, 165), chinese="牛仔蓝"),
    "slate": ColourWords(rgb=(95, 110, 130), chinese="石板灰"),
    "violet": ColourWords(rgb=(150, 80, 220), chinese="紫罗兰"),
    "plum": ColourWords(rgb=(120, 35, 120), chinese="梅子"),
    "orchid": ColourWords(rgb=(200, 100, 210), chinese="兰花"),
    "lilac": ColourWords(rgb=(205, 150, 215), chinese="丁香"),
    "mauve": ColourWords(rgb=(175, 125, 160), chinese="藕荷"),
    "fuchsia": ColourWords(rgb=(245, 60, 190), chinese="紫红"),
    "rose": ColourWords(rgb=(245, 105, 150), chinese="玫瑰"),
    "blush": ColourWords(rgb=(250, 185, 200), chinese="浅粉"),
    "salmon": ColourWords(rgb=(250, 140, 120), chinese="三文鱼"),
    "peach": ColourWords(rgb=(255, 195, 150), chinese="桃"),
    "apricot": ColourWords(rgb=(250, 175, 100), chinese="杏"),
    "crimson": ColourWords(rgb=(195, 20, 60), chinese="绯红"),
    "scarlet": ColourWords(rgb=(240, 50, 25), chinese="猩红"),
    "ruby": ColourWords(rgb=(165, 15, 50), chinese="宝石红"),
    "brick": ColourWords(rgb=(170, 65, 45), chinese="砖红"),
    "rust": ColourWords(rgb=(185, 85, 30), chinese="铁锈"),
    "copper": ColourWords(rgb=(190, 115, 65), chinese="铜"),
    "bronze": ColourWords(rgb=(150, 110, 50), chinese="青铜"),
    "caramel": ColourWords(rgb=(190, 130, 70), chinese="焦糖"),
    "chocolate": ColourWords(rgb=(85, 50, 30), chinese="巧克力"),
    "coffee": ColourWords(rgb=(110, 85, 65), chinese="咖啡"),
    "tan": ColourWords(rgb=(205, 170, 120), chinese="棕褐"),
    "khaki": ColourWords(rgb=(180, 170, 110), chinese="卡其"),
    "mustard": ColourWords(rgb=(220, 180, 50), chinese="芥末"),
    "amber": ColourWords(rgb=(255, 180, 0), chinese="琥珀"),
    "lemon": ColourWords(rgb=(250, 240, 90), chinese="柠檬"),
    "emerald": ColourWords(rgb=(20, 190, 110), chinese="祖母绿"),
    "jade": ColourWords(rgb=(60, 150, 100), chinese="玉"),
    "mint": ColourWords(rgb=(150, 235, 190), chinese="薄荷"),
    "moss": ColourWords(rgb=(110, 140, 50), chinese="苔藓"),
    "pine": ColourWords(rgb=(20, 90, 60), chinese="松柏"),
    "charcoal": ColourWords(rgb=(60, 62, 68), chinese="炭黑"),
}
"""Words that only training uses: the more shapes a colour is seen with, and the other way round, the less can a pair of
both be learned by heart."""
ALL_SHAPES = SHAPES | MORE_SHAPES
ALL_COLOURS = COLOURS | MORE_COLOURS
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
    return f"{size and size + '的'}{ALL_COLOURS[item.colour].chinese}色{ALL_SHAPES[item.shape].chinese}"


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
    colour, size = ALL_COLOURS[first.colour].chinese + "色", _CHINESE_SIZES[first.size]
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
