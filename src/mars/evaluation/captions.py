"""The captioning bench: does the model name what true pictures show?

    true picture -> caption in a language -> is its first part the picture's name, or one of its CLDR keywords?

The floor is how often captions that were written of the other pictures are right for this one, so that a word that
fits everything ("face") earns nothing. Letters: N pictures.
"""

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mars.data.shards import Picture
from mars.evaluation.metrics import interval, resample, summary
from mars.evaluation.questions import LANGUAGES
from mars.pipeline import MarsPipeline

SPLITS = {"trained pictures": "train", "held-out pictures": "picture"}
"""The second shows trained concepts in styles in which they were never seen."""
NAMES = ("name", "tags", "paraphrase")
"""Kinds of captions that name a picture: its name, and CLDR's keywords, those that training never read included."""
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


def judge(pictures: Sequence[Picture], captions: Sequence[str], *, language: str, seed: int) -> dict[str, Any]:
    """Figures of captions that were written of as many pictures, with `rights`, one for each."""
    calls = [said(caption) for caption in captions]
    named = [names_of(one, language=language) for one in pictures]
    fits_NN = np.array([[call in names for call in calls] for names in named], dtype=np.float64)
    exact_N = np.array(
        [call in names_of(one, language=language, kinds=("name",)) for call, one in zip(calls, pictures, strict=True)],
        dtype=np.float64,
    )
    right_N = fits_NN.diagonal().copy()
    floor_N = (fits_NN.sum(axis=1) - right_N) / max(1, len(pictures) - 1)
    return {
        "pictures": len(pictures),
        "right": summary(right_N, floor=floor_N, ceiling=np.ones_like(right_N), seed=seed),
        "exact": float(exact_N.mean()),
        "exact_interval": interval(resample([exact_N], seed=seed)[0]),
        "rights": [bool(one) for one in right_N],
    }


def _is_named(picture: Picture) -> bool:
    return all(names_of(picture, language=language) for language in LANGUAGES)
