"""The compositional bench: do drawn scenes show what was asked for, in combinations that training never saw?

    held-out scene -> prompt -> drawn picture -> detector -> right or wrong, in the respect that the category is about
    held-out scene -> true picture -> image tokenizer, there and back -> detector -> the ceiling
    drawn picture, prompt of another -> right or wrong -> the floor

T2I-CompBench's categories in miniature (Huang et al. 2023), size in the place of texture, and nothing learned as a
judge. Every prompt holds a held-out combination (`scene_combinations.HELD_OUT`) of its category, and, but for
`complex`, of no other kind. Letters: N prompts of a category.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from PIL import Image

from mars.data.scene_combinations import held_out_of
from mars.data.scene_words import Relation, Scene, SceneObject, Size, captions_of
from mars.data.scenes import draw_scene, make_scene
from mars.evaluation.detector import Found, detect, found_in
from mars.evaluation.metrics import Floats, summary

Category = Literal["colour", "shape", "size", "count", "spatial", "complex"]

CATEGORIES: dict[Category, str] = {
    "colour": "two shapes of two colours, one of them in a colour that it never had",
    "shape": "two shapes of one colour, which one of them never had",
    "size": "a thing of a size that it never had, or a small and a large shape that never met",
    "count": "two to four of a thing that never came in that number",
    "spatial": "two shapes that never stood so",
    "complex": "three in order, or a small thing beside a large one: colours, shapes, sizes and places at once",
}
"""What each asks for; also in the report."""
SEARCHED = 30_000
"""Scenes that prompts are chosen from; a rarer combination is not asked for."""
SMALL_BELOW, LARGE_ABOVE = 0.295, 0.50
"""Between the widths that size words mean (`scenes`), as shares of the picture's side."""
OVER: dict[Relation, tuple[int, int]] = {"left": (1, 0), "right": (-1, 0), "above": (0, 1), "below": (0, -1)}
"""From a thing to the next, where the thing is to the left of it, ..."""

Respects = dict[str, bool]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A scene to draw."""

    category: Category
    scene: Scene

    def prompt(self, language: str) -> str:
        """The scene in the words that training uses."""
        return next(one.text for one in captions_of(self.scene) if (one.language, one.kind) == (language, "scene"))


def category_of(scene: Scene) -> Category | None:
    """Which category may ask for a scene; None for those without a held-out combination, and for mixtures of kinds."""
    aspects = held_out_of(scene).keys()
    if aspects == {"size"} and scene.kind in ("single", "pair"):
        return "size"
    if aspects and (scene.kind == "line" or {item.size for item in scene.objects} == {"small", "large"}):
        return "complex"
    if aspects == {"count"}:
        return "count"
    if aspects == {"place"} and scene.kind == "pair":
        return "spatial"
    if aspects == {"colour"} and scene.kind == "pair":
        colours, shapes = ({getattr(item, name) for item in scene.objects} for name in ("colour", "shape"))
        if len(shapes) == 2:
            return "colour" if len(colours) == 2 else "shape"
    return None


def choose_tasks(*, count: int, seed: int, size: int) -> dict[Category, list[Task]]:
    """At most `count` scenes of each category, no two with the same words; the same seed gives the same ones."""
    chosen: dict[Category, dict[str, Task]] = {name: {} for name in CATEGORIES}
    for index in range(SEARCHED):
        scene = make_scene(index, seed=seed, size=size)
        category = category_of(scene)
        if category is not None and len(chosen[category]) < count:
            task = Task(category=category, scene=scene)
            chosen[category].setdefault(task.prompt("en"), task)
        if all(len(tasks) == count for tasks in chosen.values()):
            break
    return {name: list(tasks.values()) for name, tasks in chosen.items()}


def _size_word(width: float) -> Size:
    return "small" if width < SMALL_BELOW else "large" if width > LARGE_ABOVE else "medium"


def _stands(one: Found, other: Found, relation: Relation) -> bool:
    """Whether `one` is on that side of the other, more than it is on any other side."""
    across, along = (there - here for here, there in zip(one.centre, other.centre, strict=True))
    x, y = OVER[relation]
    return across * x + along * y > abs(across * y + along * x)


def respects(scene: Scene, found: Sequence[Found]) -> Respects:
    """In which respects a picture is what the scene's caption asks for.

    `things`: each shape with its colour, and no others. `sizes` and `places` can only be right if things are; sizes
    that the caption does not name (medium ones of lines) are right.
    """

    def same(name: str) -> bool:
        return Counter(getattr(one, name) for one in found) == Counter(getattr(one, name) for one in scene.objects)

    right = {"number": len(found) == len(scene.objects), "shapes": same("shape"), "colours": same("colour")}
    things = _matched(scene.objects, found)
    right["things"] = things is not None
    pairs = list(zip(scene.objects, things or (), strict=things is not None))
    sized = scene.kind != "line"
    right["sizes"] = things is not None and all(not sized or _size_word(one.width) == item.size for item, one in pairs)
    right["places"] = things is not None and (
        scene.relation is None or all(_stands(one, other, scene.relation) for one, other in pairwise(things))
    )
    return right


def _matched(asked: Sequence[SceneObject], found: Sequence[Found]) -> list[Found] | None:
    """What was found in the order of what was asked for; None unless there are the same things."""
    left = list(found)
    matched = []
    for item in asked:
        one = next((one for one in left if (one.shape, one.colour) == (item.shape, item.colour)), None)
        if one is None:
            return None
        left.remove(one)
        matched.append(one)
    return None if left else matched


def is_right(task: Task, found: Sequence[Found]) -> bool:
    """Whether the picture is right in what the task's category is about."""
    right = respects(task.scene, found)
    match task.category:
        case "size":
            return right["sizes"]
        case "spatial":
            return right["places"]
        case "complex":
            return right["places"] and right["sizes"]
    return right["things"]


def floor_of(tasks: Sequence[Task], found: Sequence[Sequence[Found]]) -> Floats:
    """How often each task is fulfilled by the pictures of the other tasks, (N,)."""
    fits = np.array([[is_right(task, one) for one in found] for task in tasks], dtype=np.float64)
    others = max(1, len(tasks) - 1)
    rates: Floats = (fits.sum(axis=1) - fits.diagonal()) / others
    return rates


def _rights(tasks: Sequence[Task], found: Iterable[Sequence[Found]]) -> Floats:
    return np.array([is_right(task, one) for task, one in zip(tasks, found, strict=True)], dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What the detector says of the true pictures of one category."""

    detector: Floats
    """1 where it is right about the picture itself, (N,)."""
    ceiling: Floats
    """1 where it is right about the image tokenizer's reconstruction, (N,)."""

    @classmethod
    def of(cls, tasks: Sequence[Task], *, rebuild: Callable[[Sequence[Image.Image]], list[Image.Image]]) -> "Truth":
        """Of the tasks' true pictures."""
        pictures = [draw_scene(task.scene) for task in tasks]
        return cls(
            detector=_rights(tasks, map(detect, pictures)), ceiling=_rights(tasks, map(detect, rebuild(pictures)))
        )


def score(tasks: Sequence[Task], images: Sequence[Image.Image], *, truth: Truth, seed: int) -> dict[str, Any]:
    """Figures of pictures drawn for the tasks of one category, with what was found in each picture.

    Returns:
        `prompts`, `right` (see `metrics.summary`), `detector` and `truly_fits` (rates over true pictures: right, and
        right for the other prompts), `respects` (rates), `found` and `rights` (one for each picture).
    """
    found = [detect(image) for image in images]
    rights = _rights(tasks, found)
    shown = [respects(task.scene, one) for task, one in zip(tasks, found, strict=True)]
    return {
        "prompts": len(tasks),
        "right": summary(rights, floor=floor_of(tasks, found), ceiling=truth.ceiling, seed=seed),
        "detector": float(truth.detector.mean()),
        "truly_fits": float(floor_of(tasks, [found_in(task.scene) for task in tasks]).mean()),
        "respects": {name: float(np.mean([one[name] for one in shown])) for name in shown[0]},
        "found": [[asdict(thing) for thing in one] for one in found],
        "rights": [bool(one) for one in rights],
    }
