import re
from pathlib import Path

import pytest

from mars.data.scene_combinations import HELD_OUT, combinations_of, concept_of, held_out_of, split_of
from mars.data.scene_words import COLOURS, SHAPES, Kind, Relation, Scene, SceneObject, Size, captions_of
from mars.data.scenes import make_scene
from mars.data.shards import read_codes

CODES = Path(__file__).parents[2] / "assets/codes"
SCENES = [make_scene(index, seed=7) for index in range(4000)]


def thing(name: str, *, size: Size = "medium", left: int = 4) -> SceneObject:
    colour, shape = name.split()
    return SceneObject(shape=shape, colour=colour, size=size, box=(left, 4, left + 28, 32))


def everything(scenes: list[Scene]) -> set[str]:
    return {name for scene in scenes for names in combinations_of(scene).values() for name in names}


def words_of(combination: str) -> re.Pattern[str]:
    """What an English caption with a combination of count or size looks like, or one of a coloured thing."""
    number, _, name = combination.rpartition(" x ")
    if number:
        colour, shape = name.split()
        return re.compile(
            rf"\b{['two', 'three', 'four'][int(number) - 2]} (small |large )?{colour} {SHAPES[shape].plural}"
        )
    small, _, large = combination.partition(" with ")
    if not large:
        return re.compile(rf"\b{combination}(s|es)?\b")
    one, two = (f"{named.split()[0]} \\w+ {named.split()[1]}" for named in (small, large))
    return re.compile(rf"\b{one}\b.*\b{two}\b|\b{two}\b.*\b{one}\b")


def test_no_training_scene_holds_a_held_out_combination_but_every_word_occurs() -> None:
    training = [scene for scene in SCENES if split_of(scene) == "train"]
    seen = everything(training)
    assert not seen & frozenset.union(*HELD_OUT.values())
    for held_out in HELD_OUT.values():
        assert len(held_out & everything(SCENES)) > 0.8 * len(held_out)
    assert {f"{colour} {shape}" for colour in COLOURS for shape in SHAPES} - HELD_OUT["colour"] <= seen
    objects = [item for scene in training for item in scene.objects]
    assert {item.shape for item in objects} == set(SHAPES)
    assert {item.colour for item in objects} == set(COLOURS)
    assert {item.size for item in objects} == {"small", "medium", "large"}
    assert {scene.relation for scene in training} == {None, "left", "right", "above", "below"}
    assert {len(scene.objects) for scene in training if scene.kind == "count"} == {1, 2, 3, 4}


def test_the_committed_codes_are_of_these_scenes_and_train_no_held_out_combination() -> None:
    coded, _ = read_codes(CODES / "scenes.parquet")
    kinds: tuple[Kind, ...] = ("single", "single", "count", "count", "pair", "pair", "pair", "line", "line")
    for index, one in enumerate(coded):
        scene = make_scene(index, seed=0, spacing=2, rich=True, kinds=kinds)
        assert (one.record.captions, one.record.split) == (captions_of(scene), split_of(scene))
    trained = [caption.text for one in coded if one.record.split == "train" for caption in one.record.captions[:1]]
    assert len(trained) == 29143
    for aspect in ("colour", "count", "size"):
        for combination in HELD_OUT[aspect]:
            found = words_of(combination)
            assert not any(map(found.search, trained)), combination
            shown = [scene for scene in SCENES if combination in held_out_of(scene).get(aspect, ())]
            assert all(found.search(captions_of(scene)[0].text) for scene in shown)


def test_the_held_out_combinations_are_few_and_stay_the_same_for_ever() -> None:
    assert HELD_OUT["colour"] == {
        "blue circle",
        "pink triangle",
        "purple heart",
        "red ring",
        "pink cross",
    }
    assert HELD_OUT["place"] == {
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
    assert {aspect: len(names) for aspect, names in HELD_OUT.items()} == {
        "colour": 5,
        "place": 10,
        "count": 24,
        "size": 10,
    }


def test_counts_are_held_out_for_every_number_and_shape_and_colour() -> None:
    numbers, things = zip(*(name.split(" x ") for name in HELD_OUT["count"]), strict=True)
    assert {number: numbers.count(number) for number in numbers} == {"2": 8, "3": 8, "4": 8}
    for words, least in ((SHAPES, 3), (COLOURS, 2)):
        assert min(sum(word in thing.split() for thing in things) for word in words) >= least
    assert not HELD_OUT["colour"] & set(things)


def test_sizes_are_combined_with_things_and_with_each_other() -> None:
    small, large = thing("red circle", size="small"), thing("green star", size="large", left=60)
    pair = Scene(kind="pair", objects=(large, small), relation="above", size=128)
    assert combinations_of(pair)["size"] == {"small red circle", "large green star", "small circle with large star"}
    count = Scene(kind="count", objects=(small, small, small), relation=None, size=128)
    assert combinations_of(count) == {
        "colour": {"red circle"},
        "place": set(),
        "count": {"3 x red circle"},
        "size": {"small red circle"},
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
        "colour": {"red circle", "green star", "blue heart"},
        "place": {"circle above star", "circle above heart", "star above heart"},
        "count": set(),
        "size": set(),
    }
