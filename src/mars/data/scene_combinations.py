"""What a scene combines, and which combinations training never sees, though it sees all of their words."""

import hashlib
from itertools import combinations, permutations
from typing import Literal

from mars.data.scene_words import COLOURS, SHAPES, Scene, SceneObject, english_name

Aspect = Literal["colour", "place", "count", "size"]

_PERCENT = 8
_SALT = "scenes: "
"""Chosen so that no shape and no colour loses much: of 8 x 10 pairs 5 are held out, of 112 triples 10."""

# Counts and sizes came after the first codes were made (assets/codes/scenes.parquet), so these are chosen by hand among
# what those do not show. Of 240 counts 24: each shape once for each number, and every colour two or three times.
_COUNTS = {
    2: "gray circle, black square, red triangle, orange star, yellow heart, purple diamond, pink ring, blue cross",
    3: "brown circle, yellow square, purple triangle, red star, blue heart, green diamond, black ring, orange cross",
    4: "gray circle, pink square, red triangle, blue star, yellow heart, black diamond, green ring, brown cross",
}
# Of 160 named things 3, of 64 pairs of a small and a large thing 7.
_SIZES = (
    "large orange cross",
    "large yellow diamond",
    "large pink star",
    "small circle with large square",
    "small square with large triangle",
    "small triangle with large cross",
    "small star with large circle",
    "small heart with large diamond",
    "small ring with large star",
    "small cross with large ring",
)


def _chosen(combination: str) -> bool:
    """About 8 of 100, by the name alone and so for ever."""
    digest = hashlib.sha256((_SALT + combination).encode()).digest()
    return int.from_bytes(digest[:8]) % 100 < _PERCENT


_ORDERS = [f"{one} {word} {two}" for one, two in permutations(SHAPES, 2) for word in ("left of", "above")]
HELD_OUT: dict[Aspect, frozenset[str]] = {
    "colour": frozenset(filter(_chosen, (f"{colour} {shape}" for colour in COLOURS for shape in SHAPES))),
    "place": frozenset(filter(_chosen, _ORDERS)),
    "count": frozenset(f"{number} x {name}" for number, names in _COUNTS.items() for name in names.split(", ")),
    "size": frozenset(_SIZES),
}
"""Combinations that training never sees."""


def _in_order(scene: Scene) -> tuple[SceneObject, ...]:
    """The objects from left to right or from top to bottom."""
    return scene.objects[::-1] if scene.relation in ("right", "below") else scene.objects


def _order_word(scene: Scene) -> str:
    return "left of" if scene.relation in ("left", "right") else "above"


def concept_of(scene: Scene) -> str:
    """The canonical description: the same for the same things, whichever of a pair is named first."""
    if scene.kind in ("single", "count"):
        name = english_name(scene.objects[0])
        return name if len(scene.objects) == 1 else f"{len(scene.objects)} x {name}"
    return f" {_order_word(scene)} ".join(english_name(item) for item in _in_order(scene))


def combinations_of(scene: Scene) -> dict[Aspect, set[str]]:
    """What is combined.

    `colour`: `red circle`, every object. `place`: `circle left of square` (or `above`), every two; a square right of a
    circle is that same combination, and two of one shape make none, since counts show them side by side anyway.
    `count`: `3 x red circle`. `size`: `small red circle` where the size is named, `small circle with large square`.
    """
    found: dict[Aspect, set[str]] = {
        "colour": {f"{item.colour} {item.shape}" for item in scene.objects},
        "place": set(),
        "count": set(),
        "size": {english_name(item) for item in scene.objects if item.size != "medium"},
    }
    if scene.relation is not None:
        pairs = combinations([item.shape for item in _in_order(scene)], 2)
        found["place"] = {f"{one} {_order_word(scene)} {two}" for one, two in pairs if one != two}
        by_size = {item.size: item.shape for item in scene.objects}
        if by_size.keys() == {"small", "large"}:
            found["size"].add(f"small {by_size['small']} with large {by_size['large']}")
    elif len(scene.objects) > 1:
        found["count"] = {f"{len(scene.objects)} x {scene.objects[0].colour} {scene.objects[0].shape}"}
    return found


def held_out_of(scene: Scene) -> dict[Aspect, set[str]]:
    """The combinations of a scene that training never sees; aspects without any are left out."""
    held_out = {aspect: names & HELD_OUT[aspect] for aspect, names in combinations_of(scene).items()}
    return {aspect: names for aspect, names in held_out.items() if names}


def split_of(scene: Scene) -> str:
    """`combination` if the scene holds any held-out combination, else `train`."""
    return "combination" if held_out_of(scene) else "train"
