import io
import itertools
import random

import numpy as np
import pytest
from PIL import Image

from mars.data.scene_combinations import concept_of, split_of
from mars.data.scene_words import ALL_COLOURS, ALL_SHAPES, COLOURS, SHAPES, Scene, SceneObject, captions_of
from mars.data.scenes import SPACINGS, draw_scene, make_scene, make_scenes
from mars.errors import RequestError

SCENES = [make_scene(index, seed=7) for index in range(4000)]
RICH = [make_scene(index, seed=7, spacing=2, rich=True) for index in range(4000)]


def pixels(scene: Scene) -> np.ndarray:
    return np.asarray(draw_scene(scene), dtype=np.int32)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("size", [64, 100, 128, 256])
def test_boxes_lie_inside_apart_and_as_the_relation_says(size: int, spacing: int) -> None:
    for index in range(800):
        scene = make_scene(index, seed=size, size=size, spacing=spacing)
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
    for scene in SCENES[:300] + RICH[:300]:
        inked = pixels(scene).min(axis=2) < 250
        for item in scene.objects:
            left, top, right, bottom = item.box
            inside = inked[top:bottom, left:right]
            for edge in (inside[:2], inside[-2:], inside[:, :2], inside[:, -2:]):
                assert edge.any()
            inked[top:bottom, left:right] = False
        assert not inked.any()


def test_each_box_is_filled_with_its_own_colour() -> None:
    for scene in SCENES[:300] + RICH[:300]:
        image = pixels(scene)
        for item in scene.objects:
            left, top, right, bottom = item.box
            same = (image[top:bottom, left:right] == ALL_COLOURS[item.colour].rgb).all(axis=2)
            assert same.mean() > 0.2


def test_every_two_shapes_look_different() -> None:
    drawn = []
    for shape in ALL_SHAPES:
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
    assert len({draw_scene(scene).tobytes() for scene in circles}) > 0.7 * len(circles)


def test_things_stand_on_the_grid_of_the_codes() -> None:
    for scene in SCENES:
        assert all(edge % 8 == 0 for item in scene.objects for edge in item.box)


def test_things_on_every_second_place_are_told_by_the_same_cells_wherever_they_stand() -> None:
    """Cells of two by two codes, which shapes of one name and size cut in one way; and the captions stay as varied."""
    widths: dict[str, set[int]] = {}
    wide = [make_scene(index, seed=7, spacing=2) for index in range(4000)]
    for scene in wide:
        for item in scene.objects:
            left, top, right, _ = item.box
            assert left % 16 == top % 16 == 8
            widths.setdefault(scene.kind if scene.kind == "line" else item.size, set()).add(right - left)
    assert widths == {"small": {24}, "medium": {48}, "large": {72}, "line": {24}}
    for one, other in ((SCENES, wide), (wide, SCENES)):
        assert {scene.kind for scene in one} == {scene.kind for scene in other}
        assert len({concept_of(scene) for scene in one}) > 0.9 * len({concept_of(scene) for scene in other})


def test_half_of_rich_scenes_take_all_shapes_and_half_all_colours_and_others_none() -> None:
    def words(scenes: list[Scene]) -> tuple[set[str], set[str]]:
        things = [item for scene in scenes for item in scene.objects]
        return {item.shape for item in things}, {item.colour for item in things}

    assert words(RICH) == (set(ALL_SHAPES), set(ALL_COLOURS))
    assert words(SCENES) == (set(SHAPES), set(COLOURS))
    plain = [scene for scene in RICH if words([scene])[0] <= SHAPES.keys() and words([scene])[1] <= COLOURS.keys()]
    assert 0.3 < len(plain) / len(RICH) < 0.45  # a quarter, and those of the others that happen to be plain


def test_only_the_kinds_that_are_asked_for_are_made() -> None:
    scenes = [make_scene(index, seed=7, kinds=("pair", "line")) for index in range(200)]
    assert 60 < sum(scene.kind == "pair" for scene in scenes) < 140
    assert {scene.kind for scene in scenes} == {"pair", "line"}
    twice = [make_scene(index, seed=7, kinds=("pair", "pair", "pair", "line")) for index in range(200)]
    assert 130 < sum(scene.kind == "pair" for scene in twice) < 170


def test_other_spacings_and_kinds_are_refused() -> None:
    with pytest.raises(RequestError, match="the spacing of scenes must be 1 or 2 places, got 3"):
        make_scene(0, seed=0, spacing=3)
    with pytest.raises(RequestError, match="must be some of single, count, pair, line, got pairs"):
        make_scene(0, seed=0, kinds=("pairs",))  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="got none"):
        make_scene(0, seed=0, kinds=())


def test_a_picture_carries_the_record_of_its_scene() -> None:
    for index, picture in enumerate(make_scenes(count=12, seed=5, size=96, spacing=2, rich=True)):
        scene = make_scene(index, seed=5, size=96, spacing=2, rich=True)
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
