from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from mars.data.scene_combinations import HELD_OUT, held_out_of, split_of
from mars.data.scene_words import Scene, SceneObject, Size
from mars.data.scenes import draw_scene, make_scene
from mars.evaluation import composition
from mars.evaluation.composition import (
    CATEGORIES,
    Category,
    Task,
    Truth,
    category_of,
    choose_tasks,
    floor_of,
    is_right,
    respects,
    score,
)
from mars.evaluation.detector import detect, found_in

TASKS = choose_tasks(count=14, seed=0, size=128)


def blurred(pictures: Sequence[Image.Image]) -> list[Image.Image]:
    return [one.filter(ImageFilter.GaussianBlur(1)) for one in pictures]


def thing(name: str, *, left: int, top: int = 40, width: int = 40, size: Size = "medium") -> SceneObject:
    colour, shape = name.split()
    return SceneObject(shape=shape, colour=colour, size=size, box=(left, top, left + width, top + width))


PAIR = Scene(
    kind="pair", objects=(thing("red circle", left=5), thing("green star", left=70)), relation="left", size=128
)  # fmt: skip
RIGHT = dict.fromkeys(("number", "shapes", "colours", "things", "sizes", "places"), True)


def test_every_category_has_prompts_that_no_training_scene_has() -> None:
    assert list(TASKS) == list(CATEGORIES)
    aspects = {"colour": "colour", "shape": "colour", "size": "size", "count": "count", "spatial": "place"}
    for name, tasks in TASKS.items():
        assert len({task.prompt("en") for task in tasks}) == len({task.prompt("zh") for task in tasks}) == 14
        assert len({task.scene.objects[0].shape for task in tasks}) > 3
        for task in tasks:
            assert split_of(task.scene) == "combination"
            assert category_of(task.scene) == task.category == name
            if name != "complex":
                assert held_out_of(task.scene).keys() == {aspects[name]}
    assert {task.scene.kind for task in TASKS["complex"]} == {"line", "pair"}
    assert {len(task.scene.objects) for task in TASKS["count"]} == {2, 3, 4}
    assert {task.scene.relation for task in TASKS["spatial"]} == {"left", "right", "above", "below"}


def test_the_same_seed_asks_for_the_same_and_another_for_other_scenes() -> None:
    assert choose_tasks(count=3, seed=0, size=128) == {name: tasks[:3] for name, tasks in TASKS.items()}
    assert choose_tasks(count=3, seed=1, size=128) != {name: tasks[:3] for name, tasks in TASKS.items()}


def test_what_cannot_be_asked_for_often_enough_is_asked_for_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composition, "SEARCHED", 5000)
    counts = choose_tasks(count=60, seed=0, size=128)["count"]
    assert 20 < len(counts) <= 2 * len(HELD_OUT["count"])  # small and medium


@pytest.mark.parametrize("category", CATEGORIES)
def test_true_pictures_are_right_in_every_respect(category: Category) -> None:
    truth = Truth.of(TASKS[category], rebuild=blurred)
    assert truth.detector.mean() == 1
    assert truth.ceiling.mean() > 0.9
    for task in TASKS[category]:
        assert respects(task.scene, found_in(task.scene)) == RIGHT
        assert is_right(task, found_in(task.scene))


@pytest.mark.parametrize("category", CATEGORIES)
def test_pictures_of_other_prompts_are_right_only_where_they_truly_fit(category: Category) -> None:
    tasks = TASKS[category]
    pictures = [detect(draw_scene(task.scene)) for task in tasks]
    truly = floor_of(tasks, [found_in(task.scene) for task in tasks])
    assert np.array_equal(floor_of(tasks, pictures), truly)
    assert truly.mean() < 0.1


def test_a_picture_with_one_thing_changed_is_right_in_the_other_respects() -> None:
    one, two = PAIR.objects
    third = thing("blue heart", left=5, top=85)
    changes: dict[str, tuple[tuple[SceneObject, ...], set[str]]] = {
        "same": ((one, two), set()),
        "colour": ((replace(one, colour="blue"), two), {"colours", "things", "sizes", "places"}),
        "swapped colours": ((replace(one, colour="green"), replace(two, colour="red")), {"things", "sizes", "places"}),
        "shape": ((replace(one, shape="ring"), two), {"shapes", "things", "sizes", "places"}),
        "missing": ((one,), {"number", "shapes", "colours", "things", "sizes", "places"}),
        "one more": ((one, two, third), {"number", "shapes", "colours", "things", "sizes", "places"}),
        "swapped places": ((replace(one, box=two.box), replace(two, box=one.box)), {"places"}),
        "small": ((replace(one, box=(10, 50, 38, 78)), two), {"sizes"}),
        "above": ((replace(one, box=(70, 2, 110, 42)), replace(two, box=(70, 80, 110, 120))), {"places"}),
    }
    for name, (objects, wrong) in changes.items():
        shown = respects(PAIR, detect(draw_scene(replace(PAIR, objects=objects))))
        assert {respect for respect, right in shown.items() if not right} == wrong, name


def test_the_four_relations_exclude_each_other() -> None:
    for index in range(400):
        scene = make_scene(index, seed=3)
        if scene.kind == "pair":
            asked = [replace(scene, relation=relation) for relation in ("left", "right", "above", "below")]
            shown = [each.relation for each in asked if respects(each, found_in(scene))["places"]]
            assert shown == [scene.relation]


def test_sizes_of_a_line_are_not_judged_and_its_order_is() -> None:
    objects = tuple(
        thing(name, left=2 + 42 * i, width=36) for i, name in enumerate(("red circle", "red star", "red ring"))
    )
    line = Scene(kind="line", objects=objects, relation="left", size=128)
    assert respects(line, found_in(line)) == RIGHT
    turned = replace(line, objects=(objects[1], objects[0], objects[2]))
    assert respects(turned, found_in(line)) == {**RIGHT, "places": False}


def test_figures_of_true_pictures_are_full_and_of_white_ones_empty() -> None:
    tasks = TASKS["count"][:6]
    truth = Truth.of(tasks, rebuild=list)
    full = score(tasks, [draw_scene(task.scene) for task in tasks], truth=truth, seed=0)
    assert (full["prompts"], full["detector"], full["rights"]) == (6, 1.0, [True] * 6)
    assert full["right"]["model"] == full["right"]["ceiling"] == full["right"]["share_of_way"] == 1
    assert full["respects"] == dict.fromkeys(RIGHT, 1.0)
    assert [len(one) for one in full["found"]] == [len(task.scene.objects) for task in tasks]
    empty = score(tasks, [Image.new("RGB", (128, 128), "white")] * 6, truth=truth, seed=0)
    assert empty["right"]["model"] == empty["right"]["floor"] == 0
    assert set(empty["respects"].values()) == {0.0}


def test_a_category_of_one_has_a_floor_of_nothing() -> None:
    task = TASKS["size"][0]
    assert floor_of([task], [found_in(task.scene)]).tolist() == [0.0]
    assert isinstance(task, Task)
