"""What was drawn for an order, as pictures: of each the candidate that is kept, with how it came about."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image

from mars.generation.scheduler import Candidate, Finished
from mars.picture import GeneratedImage
from mars.pipeline.orders import Generated, Order
from mars.pipeline.scoring import CaptionLikelihood, best_codes, best_pictures

if TYPE_CHECKING:
    from mars.pipeline import MarsPipeline


def finish(pipe: "MarsPipeline", order: Order, found: Sequence[Finished], *, started: float) -> Generated:
    """The pictures of an order that was taken in when `started`.

    Raises:
        RequestError: if the scorer cannot choose among candidates.
    """
    drawn = time.perf_counter()
    kept, decoded = _choose(pipe, order, found)
    images = [
        GeneratedImage(one, pipe.about(prompt, seed, how) | {"steps": str(candidate.steps)})
        for one, candidate, prompt, seed, how in zip(
            decoded, kept, order.prompts, order.seeds, order.settings, strict=True
        )
    ]  # fmt: skip
    ended = time.perf_counter()
    seconds = {"prompt_and_codes": drawn - started, "pixels": ended - drawn, "total": ended - started}
    codes = torch.stack([candidate.codes for candidate in kept])
    return Generated(images=images, prompts=order.prompts, seeds=order.seeds, codes=codes, seconds=seconds)


def _choose(
    pipe: "MarsPipeline", order: Order, found: Sequence[Finished]
) -> tuple[list[Candidate], list[Image.Image]]:  # fmt: skip
    """A candidate of each picture, and how it looks."""
    if order.scorer is None:
        kept = [picture.likeliest for picture in found]
        return kept, _look(pipe, order, kept)
    if isinstance(order.scorer, CaptionLikelihood) and order.keep is None:  # which reads codes, not pixels
        codes = [[candidate.codes for candidate in picture.candidates] for picture in found]
        kept = _numbered(found, best_codes(order.scorer, order.prompts, codes))
        return kept, _look(pipe, order, kept)
    pictures = [_look(pipe, order, picture.candidates) for picture in found]
    numbers = best_pictures(order.scorer, order.prompts, pictures)
    return _numbered(found, numbers), [every[number] for every, number in zip(pictures, numbers, strict=True)]


def _numbered(found: Sequence[Finished], numbers: Sequence[int]) -> list[Candidate]:
    return [picture.candidates[number] for picture, number in zip(found, numbers, strict=True)]


def _look(pipe: "MarsPipeline", order: Order, candidates: Sequence[Candidate]) -> list[Image.Image]:
    decoded = pipe.decode(torch.stack([candidate.codes for candidate in candidates]))
    return decoded if order.keep is None else list(map(order.keep, decoded))
