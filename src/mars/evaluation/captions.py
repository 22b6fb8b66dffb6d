"""The captioning bench: does the model say what true pictures show?

    true picture -> caption in a language -> is its first part the picture's name, or one of its CLDR keywords?
    held-out scene -> caption in a language -> is it what the scene is, in its whole?

The floor is how often captions that were written of the other pictures are right for this one, so that a word that
fits everything ("face") earns nothing. Letters: N pictures.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from mars.data.scene_words import OPPOSITE, Scene, captions_of
from mars.data.scenes import draw_scene
from mars.data.shards import Picture
from mars.evaluation.composition import Task
from mars.evaluation.metrics import interval, resample, summary
from mars.evaluation.questions import LANGUAGES
from mars.pipeline import MarsPipeline

SPLITS = {"trained pictures": "train", "held-out pictures": "picture"}
"""The second shows trained concepts in styles in which they were never seen."""
NAMES = ("name", "tags", "paraphrase")
"""Kinds of captions that name a picture: its name, and CLDR's keywords, those that training never read included."""
UNSEEN = "unseen scenes"
COMMAS = re.compile(r"[,，、]")


def names_of(picture: Picture, *, language: str, kinds: Sequence[str] = NAMES) -> frozenset[str]:
    """What a picture may be called: all that stands between commas in its captions."""
    texts = [one.text for one in picture.record.captions if one.language == language and one.kind in kinds]
    return frozenset(part.strip().casefold() for text in texts for part in COMMAS.split(text)) - {""}


def said(caption: str) -> str:
    """What a caption calls its picture: all before the first comma, behind which its style is named."""
    return COMMAS.split(caption)[0].strip(" .。").casefold()


def measure_captions(
    pipe: MarsPipeline, shard: Mapping[str, Picture], *, count: int, seed: int
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Describes `count` pictures of each of `SPLITS` in each language.

    Returns:
        By split and language `pictures`, `right` (see `metrics.summary`), `exact` and its interval (rates of captions
        whose first part is the name itself); and a line for each caption.
    """
    figures: dict[str, dict[str, Any]] = {}
    lines: list[dict[str, Any]] = []
    for title, split in SPLITS.items():
        keys = sorted(key for key, one in shard.items() if one.record.split == split and _is_named(one))
        chosen = [shard[key] for key in random.Random(f"{seed}/{split}").sample(keys, min(count, len(keys)))]
        for language in LANGUAGES if chosen else ():
            written = [pipe.caption(Image.fromarray(one.pixels()), language=language) for one in chosen]
            judged = judge(chosen, written, language=language, seed=seed)
            about = {"bench": "captions", "set": title, "language": language}
            for one, caption, right in zip(chosen, written, judged.pop("rights"), strict=True):
                lines.append({**about, "key": one.record.key, "caption": caption, "right": right})
            figures.setdefault(title, {})[language] = judged
    return figures, lines


def measure_scene_captions(
    pipe: MarsPipeline, tasks: Sequence[Task], *, seed: int
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Describes scenes in combinations that training never saw; figures and lines as of `measure_captions`.

    Right is every caption that the scene's program has for it, either thing of a pair named first; exact is the one
    that training would have given it. Every word counts: colours, shapes, sizes, number and places.
    """
    figures: dict[str, dict[str, Any]] = {}
    lines: list[dict[str, Any]] = []
    for language in LANGUAGES if tasks else ():
        written = [pipe.caption(draw_scene(task.scene), language=language) for task in tasks]
        judged = judge_scenes(tasks, written, language=language, seed=seed)
        about = {"bench": "captions", "set": UNSEEN, "language": language}
        for task, caption, right in zip(tasks, written, judged.pop("rights"), strict=True):
            lines.append({**about, "key": task.prompt("en"), "caption": caption, "right": right})
        figures.setdefault(UNSEEN, {})[language] = judged
    return figures, lines


def judge_scenes(tasks: Sequence[Task], captions: Sequence[str], *, language: str, seed: int) -> dict[str, Any]:
    """As `judge`, of captions that were written of scenes."""
    named = [words_of(task.scene, language=language) for task in tasks]
    exactly = [frozenset({task.prompt(language)}) for task in tasks]
    calls = [caption.strip(" .。").casefold() for caption in captions]
    return _figures(calls, named=named, exactly=exactly, seed=seed)


def words_of(scene: Scene, *, language: str) -> frozenset[str]:
    """All that its program calls a scene."""
    scenes = [scene]
    if scene.kind == "pair" and scene.relation is not None:
        scenes.append(replace(scene, objects=scene.objects[::-1], relation=OPPOSITE[scene.relation]))
    return frozenset(one.text for each in scenes for one in captions_of(each) if one.language == language)


def judge(pictures: Sequence[Picture], captions: Sequence[str], *, language: str, seed: int) -> dict[str, Any]:
    """Figures of captions that were written of as many pictures, with `rights`, one for each."""
    named = [names_of(one, language=language) for one in pictures]
    exactly = [names_of(one, language=language, kinds=("name",)) for one in pictures]
    return _figures([said(caption) for caption in captions], named=named, exactly=exactly, seed=seed)


def _figures(
    calls: Sequence[str], *, named: Sequence[frozenset[str]], exactly: Sequence[frozenset[str]], seed: int
) -> dict[str, Any]:
    fits_NN = np.array([[call in names for call in calls] for names in named], dtype=np.float64)
    exact_N = np.array([call in names for call, names in zip(calls, exactly, strict=True)], dtype=np.float64)
    right_N = fits_NN.diagonal().copy()
    floor_N = (fits_NN.sum(axis=1) - right_N) / max(1, len(calls) - 1)
    return {
        "pictures": len(calls),
        "right": summary(right_N, floor=floor_N, ceiling=np.ones_like(right_N), seed=seed),
        "exact": float(exact_N.mean()),
        "exact_interval": interval(resample([exact_N], seed=seed)[0]),
        "rights": [bool(one) for one in right_N],
    }


def _is_named(picture: Picture) -> bool:
    return all(names_of(picture, language=language) for language in LANGUAGES)
