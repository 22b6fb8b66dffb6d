"""Prompts to pictures for every bench: the same ones each time, each with its seed and the digest of its pixels."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from PIL import Image

from mars.generation.engine import draw
from mars.generation.request import DrawRequest
from mars.generation.sampling import Sampling
from mars.pipeline import MarsPipeline
from mars.pipeline.scoring import Scorer

BATCH = 16
"""Pictures at a time; part of what figures depend on, since rounding does."""

T = TypeVar("T")


def pixels_digest(image: Image.Image) -> str:
    """Of a picture's size and pixels."""
    pixels = image.convert("RGB")
    return "sha256:" + hashlib.sha256(repr(pixels.size).encode() + pixels.tobytes()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A drawn picture, and how to draw it again."""

    prompt: str
    seed: int
    image: Image.Image

    def line(self) -> dict[str, Any]:
        """What a line of predictions.jsonl says of it."""
        return {"prompt": self.prompt, "seed": self.seed, "pixels": pixels_digest(self.image)}


class Painter(Protocol):
    """Whoever draws what the benches look at, ours or another model."""

    @property
    def seed(self) -> int:
        """Of the first picture of whatever is drawn; the others count up from it."""

    def draw(self, prompts: Sequence[str], *, first: int = 0) -> list[Drawing]:
        """One picture for each prompt; `first` is the number of the first, which its seed counts from."""

    def draw_without_prompt(self, count: int) -> list[Image.Image]:
        """Pictures that no prompt asked for: the floor."""

    def rebuild(self, pictures: Sequence[Image.Image]) -> list[Image.Image]:
        """Pictures as the painter would show them at best: the ceiling."""


@dataclass(frozen=True, kw_only=True)
class Artist:
    """A painter: a model with its settings."""

    pipe: MarsPipeline
    sampling: Sampling
    seed: int
    """Of the first picture of whatever is drawn; the others count up from it."""
    scorer: Scorer | None = None
    """Chooses among candidates; without one, the model's own likelihood."""

    def draw(self, prompts: Sequence[str], *, first: int = 0) -> list[Drawing]:
        """One picture for each prompt; `first` is the number of the first, which its seed counts from."""
        drawn: list[Drawing] = []
        for some in batches(prompts):
            start = self.seed + first + len(drawn)
            seeds = list(range(start, start + len(some)))
            images = self.pipe(list(some), seed=seeds, sampling=self.sampling, scorer=self.scorer).images
            drawn += [
                Drawing(prompt=prompt, seed=seed, image=image)
                for prompt, seed, image in zip(some, seeds, images, strict=True)
            ]
        return drawn

    def draw_without_prompt(self, count: int) -> list[Image.Image]:
        """Pictures for the empty prompt, which the pipeline refuses: the beginning-of-text id alone, not guided."""
        empty = (self.pipe.model.text_tokenizer.bos_id,)
        plain, cell = replace(self.sampling, guidance=1.0), self.pipe.model.transformer.vocabulary.cell
        seeds = range(self.seed, self.seed + count)
        requests = [
            DrawRequest(
                prompt=empty, free=empty, grid=self.pipe.model.info.grids[0], seed=number, sampling=plain,
                side=cell, cell=cell,
            )
            for number in seeds
        ]  # fmt: skip
        pictures: list[Image.Image] = []
        for some in batches(requests):
            pictures += self.pipe.decode(torch.stack(draw(self.pipe.model.transformer, some)))
        return pictures

    def rebuild(self, pictures: Sequence[Image.Image]) -> list[Image.Image]:
        """Pictures put through the image tokenizer: the best that any choice of codes could be expected to show."""
        rebuilt: list[Image.Image] = []
        for some in batches(pictures):
            rebuilt += self.pipe.decode(torch.stack([self.pipe.encode(one) for one in some]))
        return rebuilt


def batches(items: Sequence[T]) -> list[Sequence[T]]:
    """Of `BATCH` items, the last one of what is left."""
    return [items[start : start + BATCH] for start in range(0, len(items), BATCH)]
