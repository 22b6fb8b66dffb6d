"""The emoji bench: are drawn pictures recognised, do they differ, and are they copies?

    prompt -> drawn picture -> features --.
                                           >- which of 100 true pictures of the same style is closest?
    true pictures ---------> features --'

The same figure for pictures drawn without a prompt (the floor) and for the true pictures put through the image
tokenizer (the ceiling) says what a score is worth. Letters: N prompts, Q queries of one prompt, C candidates,
D features, S seeds, P numbers of a small picture.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mars.data.shards import Picture
from mars.errors import DataError
from mars.evaluation.config import EmojiBench
from mars.evaluation.distribution import described, distances, features_of, open_network
from mars.evaluation.drawing import BATCH, Drawing, Painter
from mars.evaluation.features import EfficientNetLite0
from mars.evaluation.metrics import hits, interval, ranks, resample, summary
from mars.evaluation.questions import CANDIDATES, LANGUAGES, SETS, Question, Seen, choose_questions
from mars.evaluation.report import Pair, contact_sheet

FLOOR_PICTURES = 64
SHEET = 32
TOPS = (1, 5)
SMALL = 32
"""Pixels on each side of the pictures whose distance says whether one is a copy."""
DISTRIBUTION = 512
"""True pictures that FID and KID compare with, at most."""
COMPARED = 256
"""Most true pictures of a kind that are compared with all training pictures."""


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features (·, D) that all questions share."""

    true: dict[str, Tensor]
    """By key, of every candidate; (D,)."""
    floor_QD: Tensor
    rebuilt: dict[str, Tensor]
    """By key, of the true pictures' reconstructions; (D,)."""

    def candidates(self, question: Question) -> Tensor:
        """Features of a question's candidates, (C, D)."""
        return torch.stack([self.true[key] for key in question.candidates])


@dataclass
class Drawn:
    """What came of one set in one language."""

    ranks: list[int] = field(default_factory=list)
    predictions: list[dict[str, Any]] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    drawings: list[Drawing] = field(default_factory=list)


@dataclass
class Retrieval:
    """What came of all sets."""

    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By set, then by language."""
    predictions: list[dict[str, Any]] = field(default_factory=list)
    sheets: dict[str, Image.Image] = field(default_factory=dict)
    """`drawn-LANGUAGE`: pictures of the first set."""
    drawings: dict[str, list[Drawing]] = field(default_factory=dict)
    """By set, of all languages."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The questions of a shard."""

    questions: dict[str, list[Question]]
    """By set."""
    notes: list[str]
    """What is smaller than it was meant to be."""


def ask(shard: dict[str, Picture], bench: EmojiBench, *, seed: int) -> Asked:
    """Chooses the questions of all wanted sets.

    Raises:
        DataError: if the shard holds none.
    """
    counts = {name: max(1, int(bench.prompts * SETS[name].share)) for name in SETS if name in bench.sets}
    seen = Seen.of(shard.values())
    questions, notes = {}, []
    for name, count in counts.items():
        leaks = seen.leaks(shard, chosen=SETS[name])
        group = choose_questions(shard, chosen=SETS[name], count=count, seed=seed, without=leaks)
        questions[name] = group
        if leaks:
            notes.append(f"{name}: {len(leaks)} pictures of the shard were dropped: training has seen the same")
        if len(group) < count:
            notes.append(f"{name}: the shard holds {len(group)} prompts in both languages of the {count} asked for")
        few = [len(question.candidates) for question in group if len(question.candidates) < CANDIDATES]
        if few:
            notes.append(f"{name}: {len(few)} prompts have fewer than {CANDIDATES} candidates, at least {min(few)}")
    if not any(questions.values()):
        raise DataError(
            f"{bench.pictures} holds no captions in both languages for {', '.join(counts)}; take data/emoji.tar"
        )
    return Asked(questions=questions, notes=notes)


def _open(picture: Picture) -> Image.Image:
    return Image.fromarray(picture.pixels())


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """True pictures, and who looks at them."""

    artist: Painter
    network: EfficientNetLite0
    shard: dict[str, Picture]

    def shared_features(self, questions: Iterable[Question]) -> Features:
        """Features of all candidates, of the floor and of the reconstructions."""
        questions = list(questions)
        keys = sorted({key for question in questions for key in question.candidates})
        asked = sorted({question.key for question in questions})
        rebuilt = self.artist.rebuild([_open(self.shard[key]) for key in asked])
        return Features(
            true=dict(zip(keys, self.network.features_of(_open(self.shard[key]) for key in keys), strict=True)),
            floor_QD=self.network.features_of(self.artist.draw_without_prompt(FLOOR_PICTURES)),
            rebuilt=dict(zip(asked, self.network.features_of(rebuilt), strict=True)),
        )

    def measure(self, name: str, questions: Sequence[Question], *, features: Features, found: Retrieval) -> None:
        """Draws the prompts of one set in all languages, and adds what came of it."""
        for language in LANGUAGES if questions else ():
            drawn = self._draw_and_rank(questions, features=features, language=language)
            figures = _figures(drawn, questions=questions, features=features, seed=self.artist.seed)
            found.figures.setdefault(name, {})[language] = figures
            found.predictions += [{"bench": "emoji", "set": name, **line} for line in drawn.predictions]
            found.sheets.setdefault(f"drawn-{language}", contact_sheet(drawn.pairs))
            found.drawings.setdefault(name, []).extend(drawn.drawings)

    def _draw_and_rank(self, questions: Sequence[Question], *, features: Features, language: str) -> Drawn:
        """Draws one picture per question and looks for the true one."""
        drawings = self.artist.draw([question.prompts[language] for question in questions])
        found = Drawn(drawings=drawings)
        queries_ND = self.network.features_of(drawing.image for drawing in drawings)
        for question, drawing, query_D in zip(questions, drawings, queries_ND, strict=True):
            candidates_CD = features.candidates(question)
            rank = int(ranks(query_D[None], candidates_CD, right=0)[0])
            closest = self.shard[question.candidates[int((candidates_CD @ query_D).argmax())]].record
            found.ranks.append(rank)
            line = {"language": language, **drawing.line(), "key": question.key, "rank": rank + 1}
            found.predictions.append({**line, "retrieved": closest.key, "retrieved_name": closest.captions[0].text})
            if len(found.pairs) < SHEET:
                label = f"{rank + 1}: {drawing.prompt if drawing.prompt.isascii() else question.key}"
                true = _open(self.shard[question.key])
                found.pairs.append(Pair(label=label, drawn=drawing.image, true=true, right=rank == 0))
        return found

    def diversity(self, questions: Sequence[Question], *, count: int, seeds: int) -> dict[str, Any]:
        """How far apart the features of one prompt's pictures are, beside those of different prompts' pictures.

        Distances are Euclidean, between features of length 1 (0 is the same, 1.41 unrelated); means over all pairs.
        """
        prompts = [question.prompts["en"] for question in questions[:count]]
        drawings = self.artist.draw([prompt for prompt in prompts for _ in range(seeds)])
        features_NSD = self.network.features_of(one.image for one in drawings).unflatten(0, (len(prompts), seeds))
        within_N = torch.stack([torch.pdist(one_SD).mean() for one_SD in features_NSD]).double().numpy()
        between = torch.stack([torch.pdist(one_ND).mean() for one_ND in features_NSD.transpose(0, 1)])
        means = resample([within_N], seed=self.artist.seed)[0]
        return {
            "prompts": len(prompts),
            "seeds": seeds,
            "same_prompt": float(within_N.mean()),
            "same_prompt_interval": interval(means),
            "different_prompts": float(between.mean()),
        }

    def memorisation(self, drawings: Sequence[Drawing]) -> dict[str, Any]:
        """How close drawn pictures are to the nearest training picture, beside pictures that nobody copied.

        Distances are root mean squares over 32x32 RGB pixels, 0..1. `held_out`: true pictures that training never saw,
        and `copied`: training pictures, both put through the image tokenizer, as every drawn picture is. A drawn
        picture nearer than half of `copied` counts as a copy; so many of `held_out` do, too.
        """
        splits: dict[str, list[Image.Image]] = {"train": [], "concept": []}
        for key in sorted(self.shard):
            if self.shard[key].record.split in splits:
                splits[self.shard[key].record.split].append(_open(self.shard[key]))
        if not all(splits.values()):
            raise DataError("memorisation needs pictures of the splits train and concept; take data/emoji.tar")
        train_NP = _small(splits["train"])
        few = {name: _spread(pictures, COMPARED) for name, pictures in splits.items()}
        nearest = {
            "drawn": _nearest(_small([one.image for one in drawings]), train_NP),
            "held_out": _nearest(_small(self.artist.rebuild(few["concept"])), train_NP),
            "copied": _nearest(_small(self.artist.rebuild(few["train"])), train_NP),
        }
        copy = float(nearest["copied"].median())
        return {
            "training_pictures": len(train_NP),
            "copy_below": copy,
            **{
                name: {
                    "pictures": len(found),
                    "mean": float(found.mean()),
                    "least": float(found.min()),
                    "copies": float((found < copy).double().mean()),
                }
                for name, found in nearest.items()
            },
        }

    def distribution(self, drawn: Sequence[Image.Image], *, network: str) -> dict[str, Any]:
        """FID and KID to training pictures: of drawn pictures, of other training pictures (what is left for two sets of
        the same), and of reconstructions of the same pictures (the image tokenizer's rFID).
        """
        seeing = open_network(network)
        keys = sorted(key for key, picture in self.shard.items() if picture.record.split == "train")
        shown = _spread([_open(self.shard[key]) for key in keys], 2 * DISTRIBUTION)
        true, other = shown[::2], shown[1::2]
        sets = {"drawn": drawn, "other_true": other, "rebuilt": self.artist.rebuild(true)}
        true_ND = features_of(seeing, true)
        figures = {
            name: distances(true_ND, features_of(seeing, pictures), seed=self.artist.seed)
            for name, pictures in sets.items()
        }
        return {"network": described(network), "features": true_ND.shape[1], "true_pictures": len(true), **figures}


def _spread(pictures: Sequence[Image.Image], count: int) -> list[Image.Image]:
    """At most so many, from all over."""
    return [pictures[int(place)] for place in np.linspace(0, len(pictures) - 1, min(count, len(pictures)))]


def _small(pictures: Iterable[Image.Image]) -> Tensor:
    """Pictures as numbers in 0..1, (N, P)."""
    resized = (one.convert("RGB").resize((SMALL, SMALL), Image.Resampling.BOX) for one in pictures)
    return torch.stack([torch.from_numpy(np.array(one)).flatten().float() / 255 for one in resized])


def _nearest(pictures_QP: Tensor, train_NP: Tensor) -> Tensor:
    """Root mean square distance of each picture to its nearest training picture, (Q,)."""
    found = torch.cat([torch.cdist(some, train_NP).amin(dim=1) for some in pictures_QP.split(BATCH)])
    return found / math.sqrt(pictures_QP.shape[1])


def _figures(drawn: Drawn, *, questions: Sequence[Question], features: Features, seed: int) -> dict[str, Any]:
    """Rates at each of `TOPS`. The floor of a question is its mean over all pictures drawn without a prompt."""
    floor, ceiling = [], []
    for question in questions:
        candidates_CD = features.candidates(question)
        floor.append(ranks(features.floor_QD, candidates_CD, right=0).numpy())
        ceiling.append(int(ranks(features.rebuilt[question.key][None], candidates_CD, right=0)[0]))
    figures: dict[str, Any] = {"prompts": len(questions)}
    for top in TOPS:
        figures[f"top{top}"] = summary(
            hits(np.array(drawn.ranks), top=top),
            floor=hits(np.stack(floor), top=top).mean(axis=1),
            ceiling=hits(np.array(ceiling), top=top),
            seed=seed,
        )
    return figures
