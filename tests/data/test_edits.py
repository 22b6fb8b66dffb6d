import re
from collections import Counter

import numpy as np
import pytest

from mars.data.documents import CodedImage, Text
from mars.data.edits import Edit, make_edit, make_edits
from mars.data.scene_combinations import split_of
from mars.data.scene_words import COLOURS, SHAPES, Scene, SceneObject
from mars.data.scenes import draw_scene
from mars.errors import RequestError

EDITS = [make_edit(index, seed=3) for index in range(600)]


def named(scene: Scene) -> set[tuple[str, str]]:
    return {(item.colour, item.shape) for item in scene.objects}


def only(items: set[SceneObject]) -> SceneObject:
    (item,) = items
    return item


def ends(edit: Edit) -> tuple[SceneObject | None, SceneObject | None]:
    """What the edit takes away, and what it puts there."""
    before, after = set(edit.before.objects), set(edit.after.objects)
    gone, new = before - after, after - before
    return (only(gone) if gone else None), (only(new) if new else None)


def test_all_kinds_occur() -> None:
    counts = Counter(edit.kind for edit in EDITS)
    assert counts.keys() == {"colour", "shape", "remove", "add"}
    assert min(counts.values()) > 60


def test_an_edit_changes_one_object_and_the_instruction_says_which_and_how() -> None:
    for edit in EDITS:
        gone, new = ends(edit)
        english, chinese = edit.instructions["en"], edit.instructions["zh"]
        alone = len(edit.before.objects) == 1
        if edit.kind == "colour":
            assert gone is not None
            assert new is not None
            assert (gone.shape, gone.box, gone.size) == (new.shape, new.box, new.size)
            assert english == f"make {'it' if alone else f'the {gone.colour} {gone.shape}'} {new.colour}"
        elif edit.kind == "shape":
            assert gone is not None
            assert new is not None
            assert (gone.colour, gone.box, gone.size) == (new.colour, new.box, new.size)
            assert english.endswith(f"into a {new.shape}")
            assert chinese.endswith(f"变成{SHAPES[new.shape].chinese}")
        elif edit.kind == "remove":
            assert gone is not None
            assert new is None
            assert english == f"remove the {gone.colour} {gone.shape}"
        else:
            assert gone is None
            assert new is not None
            assert re.match(rf"add an? (small |large )?{new.colour} {new.shape} ", english)
            assert f"加一{SHAPES[new.shape].measure}" in chinese


def test_whoever_is_named_is_there_once() -> None:
    for edit in EDITS:
        assert len(named(edit.before)) == len(edit.before.objects)
        assert len(named(edit.after)) == len(edit.after.objects)
        referred = re.findall(
            r"the (\w+) (\w+)", edit.instructions["en"].replace("to the left", "").replace("to the right", "")
        )
        for colour, shape in referred:
            assert colour in COLOURS
            assert (colour, shape) in named(edit.before)


def test_what_is_added_stands_where_the_instruction_says() -> None:
    seen = set()
    for edit in (edit for edit in EDITS if edit.kind == "add"):
        _, new = ends(edit)
        assert new is not None
        x, y = new.box[0] + new.box[2], new.box[1] + new.box[3]
        found = re.search(
            r"(to the left of|to the right of|above|below|between) the (\w+) (\w+)(?: and the (\w+) (\w+))?",
            edit.instructions["en"],
        )
        assert found is not None
        boxes = {(item.colour, item.shape): item.box for item in edit.before.objects}
        left, top, right, bottom = boxes[found[2], found[3]]
        seen.add(found[1])
        match found[1]:
            case "to the left of":
                assert x < left + right
            case "to the right of":
                assert x > left + right
            case "above":
                assert y < top + bottom
            case "below":
                assert y > top + bottom
            case _:
                other = boxes[found[4], found[5]]
                inside = min(left + right, other[0] + other[2]) < x < max(left + right, other[0] + other[2])
                assert inside or min(top + bottom, other[1] + other[3]) < y < max(top + bottom, other[1] + other[3])
    assert len(seen) == 5


def test_pixels_differ_inside_what_is_named_only() -> None:
    for edit in EDITS[:60]:
        changed = np.asarray(draw_scene(edit.before)) != np.asarray(draw_scene(edit.after))
        assert changed.any()
        for item in ends(edit):
            if item is not None:
                left, top, right, bottom = item.box
                changed[top:bottom, left:right] = False
        assert not changed.any()


def means(pixels: np.ndarray) -> np.ndarray:
    """In place of an image tokenizer: the mean of each 16x16 patch."""
    batch, height, width, _ = pixels.shape
    patches = pixels.reshape(batch, height // 16, 16, width // 16, 16, 3)
    return np.asarray(patches.mean(axis=(2, 4, 5)), dtype=np.int32)


def test_documents_hold_what_the_edits_are() -> None:
    documents = list(make_edits(count=40, seed=3, encode=means))
    assert [one.key for one in documents] == [f"edit-{index:06d}" for index in range(40)]
    for index, (document, edit) in enumerate(zip(documents, EDITS, strict=False)):
        source, instruction, result = document.parts
        assert isinstance(source, CodedImage)
        assert isinstance(instruction, Text)
        assert isinstance(result, CodedImage)
        assert (source.role, instruction.learned, result.role) == ("source", False, "drawn")
        assert instruction.text == edit.instructions["zh" if index % 2 else "en"]
        assert np.array_equal(source.codes, means(np.asarray(draw_scene(edit.before))[None])[0])
        assert np.array_equal(result.codes, means(np.asarray(draw_scene(edit.after))[None])[0])
        splits = {split_of(edit.before), split_of(edit.after)}
        assert document.split == ("combination" if "combination" in splits else "train")


def test_an_edit_is_the_same_whichever_others_are_made() -> None:
    assert make_edit(41, seed=3) == EDITS[41]
    assert make_edit(41, seed=4) != EDITS[41]


def test_a_picture_that_is_too_small_is_one_line() -> None:
    with pytest.raises(RequestError, match="at least 64 pixels"):
        list(make_edits(count=1, seed=0, encode=means, size=32))
