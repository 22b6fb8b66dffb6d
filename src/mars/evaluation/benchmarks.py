"""How well drawn pictures fit their prompts, and how faithful the image tokenizer is.

    prompt -> drawn picture -> features --.
                                           >- which of 100 true pictures of the same style is closest?
    true pictures ---------> features --'

The same figure for pictures drawn without a prompt (the floor) and for the true pictures put through the image
tokenizer (the ceiling) says what a score is worth. Letters: N prompts, Q queries of one prompt, C candidates,
D features.
"""

import hashlib
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import mars
from mars.data.shards import Picture, read_pictures
from mars.errors import DataError, RequestError
from mars.evaluation.features import PACKAGE, EfficientNetLite0
from mars.evaluation.metrics import hits, ranks, summary
from mars.evaluation.questions import CANDIDATES, LANGUAGES, POOL, SETS, Question, Seen, choose_questions
from mars.evaluation.report import Pair, contact_sheet, open_folder, write_report
from mars.generation.engine import draw
from mars.generation.request import DrawRequest
from mars.generation.sampling import Sampling
from mars.image_tokenizer.losses import PerceptualDistance
from mars.image_tokenizer.model import ImageTokenizer
from mars.pipeline import MarsPipeline
from mars.pipeline.orders import DEFAULT_SAMPLING
from mars.training.tokenizer_trainer import evaluate_tokenizer, reconstruction_grid

FLOOR_PICTURES = 64
BATCH = 16
SHEET = 32
TOPS = (1, 5)

T = TypeVar("T")


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


@dataclass
class Retrieval:
    """What came of all sets."""

    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By set, then by language."""
    predictions: list[dict[str, Any]] = field(default_factory=list)
    sheets: dict[str, Image.Image] = field(default_factory=dict)
    """`drawn-LANGUAGE`: pictures of the first set."""


def retrieval_benchmark(
    pipe: MarsPipeline,
    *,
    pictures: Path,
    out: Path,
    prompts: int = 200,
    seed: int = 0,
    sets: Sequence[str] = tuple(SETS),
    sampling: Sampling = DEFAULT_SAMPLING,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measures a model and writes `report.json`, `report.md`, `predictions.jsonl` and pictures into `out`.

    Args:
        pictures: a picture shard with captions in both languages.
        prompts: per language in "trained names"; the other sets have half as many.
        seed: of the choice of prompts and candidates, and of the pictures. Figures are the same for the same seed.
        sets: names of `SETS`.
        say: called with a line for each part, and with the report as markdown.

    Returns:
        What `report.json` holds.

    Raises:
        RequestError: for an unknown set, or if `out` cannot be written.
        DataError: if the shard is missing, is damaged, or holds no such prompts.
        ModelError: if the networks that pictures are measured with are not installed.
    """
    wanted = _wanted(sets, prompts=prompts)
    open_folder(out)
    network, seconds = EfficientNetLite0(), _Stopwatch(say)
    with seconds.measure("reading"):
        shard = {picture.record.key: picture for picture in read_pictures(pictures)}
        seen = Seen.of(shard.values())
        leaks = {name: seen.leaks(shard, chosen=SETS[name]) for name in wanted}
        questions = {
            name: choose_questions(shard, chosen=SETS[name], count=count, seed=seed, without=leaks[name])
            for name, count in wanted.items()
        }
    if not any(questions.values()):
        raise DataError(f"{pictures} holds no captions in both languages for {', '.join(wanted)}; take data/emoji.tar")
    bench = _Bench(pipe=pipe, network=network, shard=shard, sampling=sampling, seed=seed, seconds=seconds)
    retrieval = bench.measure(questions)
    with seconds.measure("image tokenizer"):
        held_out = [picture for picture in shard.values() if picture.record.split != "train"]
        codec, grid = tokenizer_benchmark(pipe.model.image_tokenizer, held_out=held_out)
    report = {
        **_circumstances(pipe, pictures=pictures, prompts=prompts, seed=seed, sampling=sampling),
        "retrieval": retrieval.figures,
        "image_tokenizer": codec,
        "notes": _notes(questions, wanted=wanted, leaks=leaks),
        "seconds": {name: round(value, 1) for name, value in seconds.parts.items()},
    }
    images = {**retrieval.sheets, "reconstructions": grid}
    say(write_report(out, report, predictions=retrieval.predictions, pictures=images))
    return report


def tokenizer_benchmark(
    image_tokenizer: ImageTokenizer, *, held_out: Sequence[Picture]
) -> tuple[dict[str, float], Image.Image]:
    """PSNR, SSIM, perceptual distance, codebook usage and perplexity over pictures of one size, and a grid of them.

    Where codes of less entropy are chosen, the figures of nearest codes stand beside them (`nearest_...`).

    Raises:
        DataError: if there are none.
        ModelError: if the features of the perceptual distance are not installed.
    """
    if not held_out:
        raise DataError("the image tokenizer must be measured on held-out pictures, got none; take a shard with some")
    images = torch.stack([torch.from_numpy(one.pixels()) for one in held_out]).permute(0, 3, 1, 2)
    figures = evaluate_tokenizer(image_tokenizer, images, perceptual=PerceptualDistance())
    bias_V = image_tokenizer.quantizer.bias.clone()
    if bool(bias_V.any()):
        image_tokenizer.quantizer.bias.zero_()
        nearest = evaluate_tokenizer(image_tokenizer, images)
        image_tokenizer.quantizer.bias.copy_(bias_V)
        figures |= {f"nearest_{name}": value for name, value in nearest.items()}
    columns = min(12, -(-len(images) // 2))
    shown = torch.linspace(0, len(images) - 1, 2 * columns).long()  # from all styles
    grid = reconstruction_grid(image_tokenizer, images[shown], columns=columns)
    return {**figures, "held_out_pictures": len(images)}, grid


class _Stopwatch:
    def __init__(self, say: Callable[[str], None]) -> None:
        self.parts: dict[str, float] = {}
        self.say = say

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Adds what the block took, in seconds, and tells."""
        started = time.perf_counter()
        yield
        self.parts[part] = time.perf_counter() - started
        self.say(f"{part}: {self.parts[part]:.1f} s")


def _wanted(sets: Sequence[str], *, prompts: int) -> dict[str, int]:
    """How many prompts of each set."""
    unknown = [name for name in sets if name not in SETS]
    if unknown or not sets or prompts < 1:
        raise RequestError(
            f"sets must be some of {', '.join(SETS)} and prompts at least 1, "
            f"got {', '.join(sets) or 'none'} and {prompts}"
        )
    return {name: max(1, int(prompts * chosen.share)) for name, chosen in SETS.items() if name in sets}


def _notes(
    questions: dict[str, list[Question]], *, wanted: dict[str, int], leaks: dict[str, frozenset[str]]
) -> list[str]:
    """What is smaller than it was meant to be."""
    notes = []
    for name, group in questions.items():
        if leaks[name]:
            notes.append(f"{name}: {len(leaks[name])} pictures of the shard were dropped: training has seen the same")
        if len(group) < wanted[name]:
            notes.append(
                f"{name}: the shard holds {len(group)} prompts in both languages of the {wanted[name]} asked for"
            )
        few = [len(question.candidates) for question in group if len(question.candidates) < CANDIDATES]
        if few:
            notes.append(f"{name}: {len(few)} prompts have fewer than {CANDIDATES} candidates, at least {min(few)}")
    return notes


def _open(picture: Picture) -> Image.Image:
    return Image.fromarray(picture.pixels())


@dataclass(frozen=True, kw_only=True)
class _Bench:
    """What every measurement needs."""

    pipe: MarsPipeline
    network: EfficientNetLite0
    shard: dict[str, Picture]
    sampling: Sampling
    seed: int
    seconds: _Stopwatch

    def measure(self, questions: dict[str, list[Question]]) -> Retrieval:
        """All sets in all languages."""
        found = Retrieval()
        with self.seconds.measure("true pictures, floor and ceiling"):
            features = self.shared_features([question for group in questions.values() for question in group])
        for name, group in questions.items():
            for language in LANGUAGES if group else ():
                with self.seconds.measure(f"{name}, {language}"):
                    drawn = self.draw_and_rank(group, features=features, language=language)
                figures = _figures(drawn, questions=group, features=features, seed=self.seed)
                found.figures.setdefault(name, {})[language] = figures
                found.predictions += [{"set": name, **line} for line in drawn.predictions]
                found.sheets.setdefault(f"drawn-{language}", contact_sheet(drawn.pairs))
        return found

    def shared_features(self, questions: Sequence[Question]) -> Features:
        """Features of all candidates, of the floor and of the reconstructions."""
        keys = sorted({key for question in questions for key in question.candidates})
        asked = sorted({question.key for question in questions})
        rebuilt: list[Image.Image] = []
        for some in _batches(asked):
            codes = torch.stack([self.pipe.encode(_open(self.shard[key])) for key in some])
            rebuilt += self.pipe.decode(codes)
        return Features(
            true=dict(zip(keys, self.network.features_of(_open(self.shard[key]) for key in keys), strict=True)),
            floor_QD=self.network.features_of(self.draw_floor()),
            rebuilt=dict(zip(asked, self.network.features_of(rebuilt), strict=True)),
        )

    def draw_floor(self) -> list[Image.Image]:
        """Pictures for the empty prompt, which the pipeline refuses: the beginning-of-text id alone, not guided."""
        empty = (self.pipe.model.text_tokenizer.bos_id,)
        plain = replace(self.sampling, guidance=1.0)
        seeds = range(self.seed, self.seed + FLOOR_PICTURES)
        requests = [
            DrawRequest(prompt=empty, free=empty, grid=self.pipe.model.info.grids[0], seed=number, sampling=plain)
            for number in seeds
        ]
        pictures: list[Image.Image] = []
        for some in _batches(requests):
            pictures += self.pipe.decode(torch.stack(draw(self.pipe.model.transformer, some)))
        return pictures

    def draw_and_rank(self, questions: Sequence[Question], *, features: Features, language: str) -> Drawn:
        """Draws one picture per question, `BATCH` at a time, and looks for the true one."""
        found = Drawn()
        for batch, some in enumerate(_batches(questions)):
            prompts = [question.prompts[language] for question in some]
            seeds = [self.seed + batch * BATCH + index for index in range(len(some))]
            images = self.pipe(prompts, seed=seeds, sampling=self.sampling).images
            queries = self.network.features_of(images)
            for question, prompt, seed, image, query_D in zip(some, prompts, seeds, images, queries, strict=True):
                candidates_CD = features.candidates(question)
                rank = int(ranks(query_D[None], candidates_CD, right=0)[0])
                closest = self.shard[question.candidates[int((candidates_CD @ query_D).argmax())]].record
                found.ranks.append(rank)
                line = {"language": language, "prompt": prompt, "seed": seed, "key": question.key, "rank": rank + 1}
                found.predictions.append({**line, "retrieved": closest.key, "retrieved_name": closest.captions[0].text})
                if len(found.pairs) < SHEET:
                    label = f"{rank + 1}: {prompt if prompt.isascii() else question.key}"
                    true = _open(self.shard[question.key])
                    found.pairs.append(Pair(label=label, drawn=image, true=true, right=rank == 0))
        return found


def _batches(items: Sequence[T]) -> list[Sequence[T]]:
    return [items[start : start + BATCH] for start in range(0, len(items), BATCH)]


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


def _circumstances(
    pipe: MarsPipeline, *, pictures: Path, prompts: int, seed: int, sampling: Sampling
) -> dict[str, Any]:
    """All that the figures depend on."""
    with pictures.open("rb") as file:
        shard_digest = hashlib.file_digest(file, "sha256").hexdigest()
    info = pipe.model.info
    return {
        "model": {
            "name": info.name,
            "language": info.language,
            "language_digest": info.language_digest,
            "visual_digest": pipe.model.visual_digest,
            "picture_size": pipe.sizes[0],
        },
        "settings": {
            "prompts": prompts,
            "seed": seed,
            "sampling": asdict(sampling),
            "candidates": CANDIDATES,
            "pool_per_style": POOL,
            "floor_pictures": FLOOR_PICTURES,
            "batch": BATCH,
            "features": PACKAGE,
            "pictures": pictures.name,
            "pictures_digest": f"sha256:{shard_digest}",
        },
        "versions": {"mars": mars.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "processor": platform.machine()},
    }
