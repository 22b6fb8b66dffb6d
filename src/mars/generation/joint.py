"""Text and images in one go: the model writes, decides itself when to draw, and goes on writing after it.

    text text text <img> c0 c1 ... c(N-1) </img> text text <img> ...

Every next id is chosen among text and `<img>`, whose logits come from a small head of their own beside the frozen one.
An image is drawn as any other, after all that came before it.

Letters: R rows, C columns, N = R * C codes, V text ids.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from mars.errors import RequestError
from mars.generation.batch import Batch, new_picture
from mars.generation.jacobi import new_batch
from mars.generation.request import DrawRequest
from mars.generation.sampling import Sampling, sample
from mars.model.cache import StaticCache
from mars.model.transformer import MarsTransformer, read_prefixes
from mars.sequence.interleaved import ImagePart, Part
from mars.sequence.layout import read_image, text_segment


@dataclass(frozen=True, kw_only=True)
class WriteRequest:
    """Something to go on from, and how."""

    parts: Sequence[Part]
    """Texts and images in any order; a text comes first and begins with the beginning-of-text id."""
    end: tuple[int, ...]
    """Ids that end the text."""
    grid: tuple[int, int]
    """Rows and columns of images."""
    free: tuple[int, ...]
    """What the guidance of images moves away from."""
    max_tokens: int = 256
    """Text ids at most."""
    max_images: int = 4
    writing: Sampling = field(default_factory=partial(Sampling, temperature=0))
    drawing: Sampling = field(default_factory=Sampling)
    """Candidates are not asked for: an image is shown while it is drawn."""
    seed: int = 0


@dataclass(frozen=True)
class Wrote:
    """The next text id."""

    id: int


@dataclass(frozen=True)
class DrewRow:
    """Another row of the image that is being drawn."""

    codes: Tensor
    """(rows that are done, C) int64; never the whole grid."""


@dataclass(frozen=True)
class Drew:
    """An image is done."""

    codes: Tensor
    """(R, C) int64."""


def write(transformer: MarsTransformer, request: WriteRequest) -> Iterator[Wrote | DrewRow | Drew]:
    """What the model writes and draws, as it comes.

    Raises:
        RequestError: if that, at most, does not fit into the LLM's positions, or the request cannot be.
    """
    slots = transformer.vocabulary.slots
    room = request.max_tokens + request.max_images * (request.grid[0] * request.grid[1] // slots + 2)
    given = sum(
        part.codes_RC.numel() // slots + 2 if isinstance(part, ImagePart) else len(part.ids) for part in request.parts
    )
    limit = transformer.config.language.max_positions
    if given + room > limit:
        raise RequestError(
            f"what is given and what may follow must fit into {limit} positions, got {given} and {room}; ask for fewer "
            "tokens or images"
        )
    if slots > 1 and request.drawing.window > 1:
        raise RequestError(f"window must be 1 where a step draws several codes, got {request.drawing.window}")
    if not request.parts or isinstance(request.parts[0], ImagePart):
        raise RequestError("there must be a text to begin with, got none; say something")
    return _Writer(transformer, request, size=given + room).run()


class _Writer:
    """One sequence on its way."""

    def __init__(self, transformer: MarsTransformer, request: WriteRequest, *, size: int) -> None:
        self.transformer = transformer
        self.request = request
        self.cache: StaticCache = transformer.new_static_cache(batch=1, size=size)
        self.ids: list[int] = []
        """One for each position so far."""
        self.generator = torch.Generator(transformer.device).manual_seed(request.seed)
        self.images = 0

    def run(self) -> Iterator[Wrote | DrewRow | Drew]:
        state_1D = self._begin()
        for _ in range(self.request.max_tokens):
            chosen = self._choose(state_1D)
            while chosen is None:
                for drew in self._draw():
                    yield drew
                    if isinstance(drew, Drew):
                        state_1D = self._read_image(drew.codes)
                chosen = self._choose(state_1D)
            if chosen in self.request.end:
                return
            yield Wrote(chosen)
            state_1D = self._read_text([chosen])

    def _begin(self) -> Tensor:
        state_1D = torch.empty(0)
        for part in self.request.parts:
            if isinstance(part, ImagePart):
                state_1D = self._read_image(part.codes_RC)
            else:
                state_1D = self._read_text(part.ids)
        return state_1D

    @torch.inference_mode()
    def _choose(self, state_1D: Tensor) -> int | None:
        """A text id, or None for an image."""
        text = self.transformer.text_logits(state_1D).float()
        begin = self.transformer.special_logits(state_1D).float()[:, :1]
        if self.images >= self.request.max_images:
            begin = torch.full_like(begin, -torch.inf)
        found = int(sample(torch.cat([text, begin], dim=1), [self.request.writing], [self.generator])[0])
        return None if found == text.shape[1] else found

    @torch.inference_mode()
    def _read_text(self, ids: Sequence[int]) -> Tensor:
        self.ids += ids
        hidden_1TD: Tensor = self.transformer(text_segment([list(ids)]).to(self.transformer.device), self.cache)
        return hidden_1TD[:, -1]

    @torch.inference_mode()
    def _read_image(self, codes_RC: Tensor) -> Tensor:
        """The state after an image and the id that ends it."""
        vocabulary = self.transformer.vocabulary
        codes = codes_RC.flatten()[:: vocabulary.slots] + vocabulary.first_code
        self.ids += [vocabulary.image_start, *codes.tolist()]
        self.transformer(read_image(codes_RC[None].to(self.transformer.device), vocabulary), self.cache)
        return self._read_text([vocabulary.image_end])

    def _draw(self) -> Iterator[DrewRow | Drew]:
        request = self.request
        cell = self.transformer.vocabulary.cell
        asked = DrawRequest(
            prompt=tuple(self.ids), free=request.free, grid=request.grid, seed=request.seed + self.images,
            sampling=replace(request.drawing, candidates=1), side=cell, cell=cell,
        )  # fmt: skip
        self.images += 1
        rows, row = request.grid[0], request.grid[1] * cell
        with torch.inference_mode():
            batch = self._batch(asked)
        (picture,), told = batch.pictures, 0
        while picture.done < asked.places:
            with torch.inference_mode():
                batch.step()
                codes = asked.raster(batch.codes_PN[0, : picture.done // row * row])
            if told < len(codes) < rows:
                yield DrewRow(codes)
            told = len(codes)
        yield Drew(codes)

    def _batch(self, asked: DrawRequest) -> Batch:
        transformer = self.transformer
        prefixes = [self.cache.prefix(0)]
        if len(asked.texts) > 1:
            prefixes += read_prefixes(transformer, [asked.free])
        batch = new_batch(transformer, asked)
        batch.joining.append(new_picture(transformer, asked, prefixes=prefixes))
        batch.join()
        return batch
