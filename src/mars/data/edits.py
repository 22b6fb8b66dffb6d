"""Editing triples: a scene, an instruction in English or Chinese, and the scene that it asks for.

A made-up source whose pairs are exact: outside of what the instruction names, no pixel differs.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import numpy as np
import numpy.typing as npt

from mars.data.documents import CodedImage, Document, Text
from mars.data.scene_combinations import split_of
from mars.data.scene_words import COLOURS, OPPOSITE, SHAPES, Scene, SceneObject, captions_of
from mars.data.scenes import draw_scene, make_scene

BATCH = 32
Encode = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.int32]]
"""Pictures (B, height, width, 3) to codes (B, rows, columns)."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """What a scene becomes, and how one asks for it."""

    kind: Literal["colour", "shape", "remove", "add"]
    before: Scene
    after: Scene
    instructions: dict[str, str]
    """By language."""


def make_edit(index: int, *, seed: int, size: int = 128) -> Edit:
    """Edit number `index` of a seed, whichever others are made.

    Raises:
        RequestError: if `size` is below 64 pixels.
    """
    rng = random.Random(f"edit/{seed}/{index}")
    scene = make_scene(rng.randrange(2**32), seed=seed, size=size)
    while scene.kind == "count" and len(scene.objects) > 1:  # no word tells one of several from the others
        scene = make_scene(rng.randrange(2**32), seed=seed, size=size)
    place = rng.randrange(len(scene.objects))
    kinds = ("colour", "shape") if len(scene.objects) == 1 else ("colour", "shape", "remove", "add")
    kind = rng.choice(kinds)
    if kind == "remove":
        return _removed(scene, place)
    if kind == "add":
        return _added(scene, place)
    return _changed(scene, place, kind, rng)


def _referred(item: SceneObject) -> tuple[str, str]:
    """English and Chinese of one of the objects of a scene, whose colours and shapes together all differ."""
    return f"the {item.colour} {item.shape}", f"{COLOURS[item.colour].chinese}色{SHAPES[item.shape].chinese}"


def _changed(scene: Scene, place: int, kind: str, rng: random.Random) -> Edit:
    """Another colour or shape for one object; none that another object of the scene would be taken for."""
    item = scene.objects[place]
    english, chinese = ("it", "它") if len(scene.objects) == 1 else _referred(item)
    taken = {(other.colour, other.shape) for other in scene.objects}
    if kind == "colour":
        new = replace(item, colour=rng.choice([word for word in COLOURS if (word, item.shape) not in taken]))
        instructions = {"en": f"make {english} {new.colour}", "zh": f"把{chinese}变成{COLOURS[new.colour].chinese}色"}
    else:
        new = replace(item, shape=rng.choice([word for word in SHAPES if (item.colour, word) not in taken]))
        instructions = {"en": f"turn {english} into a {new.shape}", "zh": f"把{chinese}变成{SHAPES[new.shape].chinese}"}
    objects = (*scene.objects[:place], new, *scene.objects[place + 1 :])
    after = replace(scene, objects=objects)
    return Edit(kind="colour" if kind == "colour" else "shape", before=scene, after=after, instructions=instructions)


def _without(scene: Scene, place: int) -> Scene:
    objects = scene.objects[:place] + scene.objects[place + 1 :]
    if len(objects) == 1:
        return replace(scene, kind="single", objects=objects, relation=None)
    return replace(scene, kind="pair", objects=objects)


def _removed(scene: Scene, place: int) -> Edit:
    english, chinese = _referred(scene.objects[place])
    instructions = {"en": f"remove {english}", "zh": f"去掉{chinese}"}
    return Edit(kind="remove", before=scene, after=_without(scene, place), instructions=instructions)


_SIDES = {
    "left": ("to the left of", "左边"),
    "right": ("to the right of", "右边"),
    "above": ("above", "上面"),
    "below": ("below", "下面"),
}


def _added(scene: Scene, place: int) -> Edit:
    """The scene, asked for where one of its objects is missing."""
    assert scene.relation is not None
    alone = replace(scene, kind="single", objects=(scene.objects[place],), relation=None)
    english, _, chinese, _ = (caption.text for caption in captions_of(alone))
    names = [_referred(item) for item in scene.objects]
    if 0 < place < len(names) - 1:
        (one, former), (other, latter) = names[place - 1], names[place + 1]
        instructions = {"en": f"add {english} between {one} and {other}", "zh": f"在{former}和{latter}中间加{chinese}"}
    else:
        side = scene.relation if place == 0 else OPPOSITE[scene.relation]
        one, beside = names[1] if place == 0 else names[place - 1]
        instructions = {"en": f"add {english} {_SIDES[side][0]} {one}", "zh": f"在{beside}{_SIDES[side][1]}加{chinese}"}
    return Edit(kind="add", before=_without(scene, place), after=scene, instructions=instructions)


def make_edits(*, count: int, seed: int, encode: Encode, size: int = 128) -> Iterator[Document]:
    """Documents of `count` edits, half of them in English and half in Chinese; the same seed gives the same ones.

    Those with a combination that scenes hold out, before or after, are in the split `combination`.

    Raises:
        RequestError: if `size` is below 64 pixels.
    """
    numbers = iter(range(count))
    while batch := [(index, make_edit(index, seed=seed, size=size)) for index in islice(numbers, BATCH)]:
        scenes = [scene for _, edit in batch for scene in (edit.before, edit.after)]
        codes = iter(encode(np.stack([np.asarray(draw_scene(scene)) for scene in scenes])))
        for index, edit in batch:
            splits = {split_of(edit.before), split_of(edit.after)}
            yield Document(
                key=f"edit-{index:06d}",
                split="combination" if "combination" in splits else "train",
                source="scenes",
                licence="CC0-1.0",
                parts=(
                    CodedImage(codes=next(codes), role="source"),
                    Text(text=edit.instructions["en" if index % 2 == 0 else "zh"], learned=False),
                    CodedImage(codes=next(codes)),
                ),
            )
