"""Which captions are drawn, and which pictures the right one must be told from. All of it is fixed by a seed."""

import hashlib
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mars.data.shards import Picture

LANGUAGES = ("en", "zh")
CANDIDATES = 100
POOL = 150
"""Pictures of a style that wrong candidates are chosen from; more would only cost time, as each needs features."""
TRAINED_KINDS = ("name", "style", "request", "tags", "scene")
"""Kinds of captions that training may read."""


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Which captions are drawn."""

    split: str
    kind: str
    share: float
    """Of the number of prompts asked for."""
    wording: Mapping[str, str] | None = None
    """By language, what the caption `{}` is put into; without it, the caption itself is the prompt."""


SETS = {
    "trained names": PromptSet(split="train", kind="name", share=1),
    "held-out pictures": PromptSet(split="picture", kind="name", share=0.5),
    "held-out concepts": PromptSet(split="concept", kind="name", share=0.5),
    "paraphrases": PromptSet(split="train", kind="paraphrase", share=0.5),
    "other wordings": PromptSet(
        split="train", kind="name", share=0.5, wording={"en": "please draw {} for me", "zh": "请给我画一个{}"}
    ),
}
"""Trained names stand first: the contact sheets show them."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """Prompts for one true picture, and what it must be told from."""

    key: str
    prompts: dict[str, str]
    """By language."""
    candidates: tuple[str, ...]
    """Keys; the true picture is the first."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What training may have seen of a shard."""

    pixels: frozenset[bytes]
    """Digests."""
    captions: frozenset[str]

    @classmethod
    def of(cls, pictures: Iterable[Picture]) -> "Seen":
        """Of the pictures of the split `train`."""
        trained = [picture for picture in pictures if picture.record.split == "train"]
        captions = (caption for picture in trained for caption in picture.record.captions)
        return cls(
            pixels=frozenset(map(_pixels_digest, trained)),
            captions=frozenset(caption.text for caption in captions if caption.kind in TRAINED_KINDS),
        )

    def leaks(self, shard: dict[str, Picture], *, chosen: PromptSet) -> frozenset[str]:
        """Keys that a set must do without.

        They are held out yet look like a trained picture pixel for pixel, or their paraphrase is a trained caption.
        """
        possible = _possible(shard, chosen=chosen)
        if chosen.split != "train":
            return frozenset(key for key in possible if _pixels_digest(shard[key]) in self.pixels)
        if chosen.kind not in TRAINED_KINDS:
            return frozenset(key for key, prompts in possible.items() if self.captions & set(prompts.values()))
        return frozenset()


def choose_questions(
    shard: dict[str, Picture], *, chosen: PromptSet, count: int, seed: int, without: frozenset[str] = frozenset()
) -> list[Question]:
    """At most `count` questions, at random over all styles; the same seed gives the same ones.

    None is about a picture whose key is in `without` (see `Seen.leaks`).

    A candidate is any picture of the same style, of whatever split, that shows another concept, bears none of the
    question's texts as a caption, and is not pixel for pixel the true picture (Norway's flag is Svalbard's).
    """
    dice = random.Random(f"{seed}/{chosen.split}/{chosen.kind}")  # other words for the same pictures
    possible = [key for key in _possible(shard, chosen=chosen) if key not in without]
    keys = dice.sample(possible, min(count, len(possible)))
    pools = {}
    for style in sorted({shard[key].record.style for key in keys}):
        members = [key for key, picture in shard.items() if picture.record.style == style]
        pools[style] = random.Random(f"{seed}/{style}").sample(members, min(POOL, len(members)))
    questions = []
    for key in keys:
        picture, prompts = shard[key], _prompts(shard[key], chosen=chosen)
        names = {caption.text for caption in picture.record.captions if caption.kind == "name"}
        texts = {*names, *prompts.values()}
        pool = [other for other in pools[picture.record.style] if _differs(shard[other], picture=picture, texts=texts)]
        wrong = dice.sample(pool, min(CANDIDATES - 1, len(pool)))
        questions.append(Question(key=key, prompts=prompts, candidates=(key, *wrong)))
    return questions


def _pixels_digest(picture: Picture) -> bytes:
    pixels = picture.pixels()
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()


def _possible(shard: dict[str, Picture], *, chosen: PromptSet) -> dict[str, dict[str, str]]:
    """The prompts of each picture that has them in all languages, by key."""
    prompts = {key: _prompts(picture, chosen=chosen) for key, picture in shard.items()}
    return {key: found for key, found in prompts.items() if found.keys() == set(LANGUAGES)}


def _prompts(picture: Picture, *, chosen: PromptSet) -> dict[str, str]:
    """The captions of the wanted split and kind by language, if any."""
    if picture.record.split != chosen.split:
        return {}
    words = chosen.wording or dict.fromkeys(LANGUAGES, "{}")
    return {
        caption.language: words[caption.language].format(caption.text)
        for caption in picture.record.captions
        if caption.kind == chosen.kind and caption.language in words
    }


def _differs(other: Picture, *, picture: Picture, texts: set[str]) -> bool:
    same_concept = other.record.concept == picture.record.concept
    return not (same_concept or other.content == picture.content or texts & {one.text for one in other.record.captions})
