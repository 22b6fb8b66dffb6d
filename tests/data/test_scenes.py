import io
import itertools
import random
import re

import numpy as np
import pytest
from PIL import Image

from mars.data.scenes import (
    COLOURS,
    SHAPES,
    Kind,
    Relation,
    Scene,
    SceneObject,
    Size,
    captions_of,
    combinations_of,
    concept_of,
    draw_scene,
    is_held_out,
    make_scene,
    make_scenes,
    split_of,
)
from mars.errors import RequestError

SCENES = [make_scene(index, seed=7) for index in range(4000)]


def thing(name: str, *, size: Size = "medium", left: int = 4) -> SceneObject:
    colour, shape = name.split()
    return SceneObject(shape=shape, colour=colour, size=size, box=(left, 4, left + 28, 32))


def texts(*names: str, kind: Kind, relation: Relation | None = None, size: Size = "medium") -> list[str]:
    """All captions of a scene: English, its paraphrase, Chinese, its paraphrase."""
    objects = tuple(thing(name, size=size, left=4 + 40 * i) for i, name in enumerate(names))
    return [each.text for each in captions_of(Scene(kind=kind, objects=objects, relation=relation, size=128))]


def pixels(scene: Scene) -> np.ndarray:
    return np.asarray(draw_scene(scene), dtype=np.int32)


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


def test_no_training_scene_holds_a_held_out_combination_but_every_word_occurs() -> None:
    training = [scene for scene in SCENES if split_of(scene) == "train"]
    seen = set().union(*map(combinations_of, training))
    every = {f"{colour} {shape}" for colour in COLOURS for shape in SHAPES}
    assert not any(map(is_held_out, seen))
    assert {name for name in every if not is_held_out(name)} <= seen
    objects = [item for scene in training for item in scene.objects]
    assert {item.shape for item in objects} == set(SHAPES)
    assert {item.colour for item in objects} == set(COLOURS)
    assert {item.size for item in objects} == {"small", "medium", "large"}
    assert {scene.relation for scene in training} == {None, "left", "right", "above", "below"}
    assert {len(scene.objects) for scene in training if scene.kind == "count"} == {1, 2, 3, 4}


def test_the_held_out_combinations_are_few_and_stay_the_same_for_ever() -> None:
    pairs = [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS]
    triples = [
        f"{one} {order} {two}" for order in ("left of", "above") for one, two in itertools.permutations(SHAPES, 2)
    ]
    assert set(filter(is_held_out, pairs)) == {
        "blue circle",
        "pink triangle",
        "purple heart",
        "red ring",
        "pink cross",
    }
    assert set(filter(is_held_out, triples)) == {
        "circle left of square",
        "circle left of ring",
        "square left of heart",
        "heart left of triangle",
        "ring left of circle",
        "circle above ring",
        "star above square",
        "diamond above star",
        "cross above heart",
        "cross above ring",
    }


@pytest.mark.parametrize(("one", "other"), [("left", "right"), ("above", "below")])
def test_a_relation_and_its_converse_are_one_combination(one: Relation, other: Relation) -> None:
    first, second = thing("red circle"), thing("green square", left=60)
    there = Scene(kind="pair", objects=(first, second), relation=one, size=128)
    back = Scene(kind="pair", objects=(second, first), relation=other, size=128)
    assert combinations_of(there) == combinations_of(back)
    assert concept_of(there) == concept_of(back)
    assert split_of(there) == split_of(back)


def test_a_line_holds_the_triples_of_every_two_of_its_things() -> None:
    objects = (thing("red circle"), thing("green star", left=40), thing("blue heart", left=80))
    scene = Scene(kind="line", objects=objects, relation="above", size=128)
    assert combinations_of(scene) == {
        *("red circle", "green star", "blue heart"),
        *("circle above star", "circle above heart", "star above heart"),
    }


@pytest.mark.parametrize("size", [64, 100, 128, 256])
def test_boxes_lie_inside_apart_and_as_the_relation_says(size: int) -> None:
    for index in range(800):
        scene = make_scene(index, seed=size, size=size)
        boxes = [item.box for item in scene.objects]
        for left, top, right, bottom in boxes:
            assert 0 < left < right < size
            assert 0 < top < bottom < size
            assert right - left == bottom - top >= 0.1875 * size
        for one, two in itertools.combinations(boxes, 2):
            assert one[2] < two[0] or two[2] < one[0] or one[3] < two[1] or two[3] < one[1]
        for one, two in itertools.pairwise(boxes):
            match scene.relation:
                case "left":
                    assert one[2] < two[0]
                case "right":
                    assert two[2] < one[0]
                case "above":
                    assert one[3] < two[1]
                case "below":
                    assert two[3] < one[1]


def test_size_words_mean_widths_that_do_not_overlap() -> None:
    widths: dict[str, list[int]] = {"small": [], "medium": [], "large": []}
    for scene in SCENES:
        if scene.kind != "line":
            for item in scene.objects:
                widths[item.size].append(item.box[2] - item.box[0])
    assert min(widths["small"]) >= 24
    assert max(widths["small"]) + 8 < min(widths["medium"])
    assert max(widths["medium"]) + 8 < min(widths["large"])


def test_things_of_a_pair_or_line_differ_and_things_of_a_count_do_not() -> None:
    for scene in SCENES:
        names = {(item.shape, item.colour) for item in scene.objects}
        assert len(names) == (1 if scene.relation is None else len(scene.objects))


def test_pixels_are_white_outside_the_boxes_and_each_shape_touches_all_sides_of_its_box() -> None:
    for scene in SCENES[:300]:
        inked = pixels(scene).min(axis=2) < 250
        for item in scene.objects:
            left, top, right, bottom = item.box
            inside = inked[top:bottom, left:right]
            for edge in (inside[:2], inside[-2:], inside[:, :2], inside[:, -2:]):
                assert edge.any()
            inked[top:bottom, left:right] = False
        assert not inked.any()


def test_each_box_is_filled_with_its_own_colour() -> None:
    for scene in SCENES[:300]:
        image = pixels(scene)
        for item in scene.objects:
            left, top, right, bottom = item.box
            same = (image[top:bottom, left:right] == COLOURS[item.colour]).all(axis=2)
            assert same.mean() > 0.2


def test_every_two_shapes_look_different() -> None:
    drawn = []
    for shape in SHAPES:
        item = SceneObject(shape=shape, colour="black", size="small", box=(10, 10, 34, 34))
        drawn.append(pixels(Scene(kind="single", objects=(item,), relation=None, size=64)) < 128)
    for one, two in itertools.combinations(drawn, 2):
        assert (one != two).mean() > 0.01


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_pictures() -> None:
    first = list(make_scenes(count=20, seed=3))
    random.seed(0)
    assert first == list(make_scenes(count=30, seed=3))[:20]
    other = list(make_scenes(count=20, seed=4))
    assert all(one.content != two.content for one, two in zip(first, other, strict=True))


def test_pictures_of_one_description_differ() -> None:
    circles = [scene for scene in SCENES if concept_of(scene) == "red circle"]
    assert len(circles) > 3
    assert len({draw_scene(scene).tobytes() for scene in circles}) == len(circles)


def test_a_picture_carries_the_record_of_its_scene() -> None:
    for index, picture in enumerate(make_scenes(count=12, seed=5, size=96)):
        scene = make_scene(index, seed=5, size=96)
        record = picture.record
        assert record.key == f"scene-{index:06d}"
        assert (record.style, record.source, record.licence) == ("scene", "scenes", "CC0-1.0")
        assert (record.concept, record.split) == (concept_of(scene), split_of(scene))
        assert record.captions == captions_of(scene)
        image = Image.open(io.BytesIO(picture.content))
        assert (image.size, image.mode) == ((96, 96), "RGB")
        assert image.tobytes() == draw_scene(scene).tobytes()


def test_a_scene_too_small_to_show_its_shapes_is_refused() -> None:
    with pytest.raises(RequestError, match="at least 64 pixels wide, got 32"):
        make_scene(0, seed=0, size=32)
    with pytest.raises(RequestError, match="at least 64 pixels wide, got 32"):
        next(make_scenes(count=1, seed=0, size=32))
