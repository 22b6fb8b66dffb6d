import itertools
import re

import pytest

from mars.data.scene_words import Kind, Relation, Scene, SceneObject, Size, captions_of
from mars.data.scenes import make_scene

SCENES = [make_scene(index, seed=7) for index in range(4000)]


def thing(name: str, *, size: Size = "medium", left: int = 4) -> SceneObject:
    colour, shape = name.split()
    return SceneObject(shape=shape, colour=colour, size=size, box=(left, 4, left + 28, 32))


def texts(*names: str, kind: Kind, relation: Relation | None = None, size: Size = "medium") -> list[str]:
    """All captions of a scene: English, its paraphrase, Chinese, its paraphrase."""
    objects = tuple(thing(name, size=size, left=4 + 40 * i) for i, name in enumerate(names))
    return [each.text for each in captions_of(Scene(kind=kind, objects=objects, relation=relation, size=128))]


def test_a_single_thing_is_named_with_its_size_unless_it_is_medium() -> None:
    assert texts("red circle", kind="single", size="large") == [
        "a large red circle",
        "a circle that is large and red",
        "一个大的红色圆形",
        "一个圆形，颜色是红色，尺寸很大",
    ]
    assert texts("orange star", kind="single") == [
        "an orange star",
        "a star that is orange",
        "一颗橙色星星",
        "一颗星星，颜色是橙色",
    ]


def test_counts_use_plurals_and_measure_words() -> None:
    assert texts(*["blue star"] * 3, kind="count") == [
        "three blue stars",
        "three stars, all of them blue",
        "三颗蓝色星星",
        "蓝色的星星，一共三颗",
    ]
    assert texts(*["pink cross"] * 2, kind="count", size="small") == [
        "two small pink crosses",
        "two crosses, both of them small and pink",
        "两个小的粉色十字",
        "粉色的小十字，一共两个",
    ]
    assert texts("black ring", kind="count") == [
        "one black ring",
        "just one ring, which is black",
        "一个黑色圆环",
        "黑色的圆环，只有一个",
    ]


@pytest.mark.parametrize(
    ("relation", "expected"),
    [
        ("left", ("a red circle to the left of an orange square", "橙色正方形左边有一个红色圆形")),
        ("right", ("a red circle to the right of an orange square", "橙色正方形右边有一个红色圆形")),
        ("above", ("a red circle above an orange square", "橙色正方形上面有一个红色圆形")),
        ("below", ("a red circle below an orange square", "橙色正方形下面有一个红色圆形")),
    ],
)
def test_a_pair_is_named_with_its_relation(relation: Relation, expected: tuple[str, str]) -> None:
    english, _, chinese, _ = texts("red circle", "orange square", kind="pair", relation=relation)
    assert (english, chinese) == expected


def test_a_pair_is_paraphrased_from_the_other_side() -> None:
    _, english, _, chinese = texts("red circle", "green square", kind="pair", relation="left")
    assert english == "a green square with a red circle on its left"
    assert chinese == "红色圆形在绿色正方形的左边"
    assert texts("red circle", "green heart", kind="pair", relation="below")[1] == (
        "a green heart with a red circle below it"
    )


def test_three_things_are_listed_in_their_order() -> None:
    names = ("red circle", "blue star", "green square")
    assert texts(*names, kind="line", relation="left") == [
        "a red circle, a blue star and a green square from left to right",
        "on the left a red circle, in the middle a blue star, on the right a green square",
        "从左到右依次是一个红色圆形、一颗蓝色星星和一个绿色正方形",
        "左边是一个红色圆形，中间是一颗蓝色星星，右边是一个绿色正方形",
    ]
    assert texts(*names, kind="line", relation="above")[::2] == [
        "a red circle, a blue star and a green square from top to bottom",
        "从上到下依次是一个红色圆形、一颗蓝色星星和一个绿色正方形",
    ]


def test_every_scene_has_one_trained_and_one_held_out_phrasing_per_language() -> None:
    for scene in SCENES:
        captions = captions_of(scene)
        assert [(each.language, each.kind) for each in captions] == [
            ("en", "scene"),
            ("en", "paraphrase"),
            ("zh", "scene"),
            ("zh", "paraphrase"),
        ]
        assert len({each.text for each in captions}) == 4
        for each in captions[:2]:
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  |None", each.text), each.text


def test_no_paraphrase_is_a_trained_caption_of_any_scene() -> None:
    trained: set[str] = set()
    held_out: set[str] = set()
    for caption in itertools.chain.from_iterable(map(captions_of, SCENES)):
        (trained if caption.kind == "scene" else held_out).add(caption.text)
    assert not trained & held_out
