"""Ids in, ids out: draws code grids for prompts, and continues text. Knows neither pixels nor strings.

Letters: B requests, T positions, R rows, C columns, N = R * C codes, K codes of a step, V ids to choose from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from mars.errors import RequestError
from mars.generation.guidance import Guidance
from mars.generation.sampling import Sampling, sample
from mars.model.cache import StaticCache
from mars.model.transformer import MarsTransformer, read_prefixes
from mars.sequence.layout import Modality, Segment, read_image, text_segment


@dataclass(frozen=True, kw_only=True)
class DrawRequest:
    """One image to draw."""

    prompt: tuple[int, ...]
    """Text ids, with the beginning-of-text id."""
    free: tuple[int, ...]
    """What guidance moves away from: the text ids of the empty (or negative) prompt."""
    seed: int
    sampling: Sampling


Request = TypeVar("Request", bound=DrawRequest)

MAX_ROWS = 128
"""Candidates that are drawn at once; more would only wait for each other."""
SEED_STRIDE = 0x1E3779B97F4A7C15
"""Between the seeds of the candidates of one request."""

Progress = Callable[[int, int], None]
"""Called after each step with how many codes are done and how many there are."""
Tell = Callable[[int], None]
"""Called after each step of a batch with how many of its codes are done."""


@torch.inference_mode()
def draw(
    transformer: MarsTransformer,
    requests: Sequence[DrawRequest],
    *,
    grid: tuple[int, int],
    release_language: bool = False,
    progress: Progress | None = None,
) -> Tensor:
    """Draws one code grid per request, in batches of at most `MAX_ROWS` candidates; (B, R, C) int64.

    Prompts may differ in length. A row's codes depend on its own request alone, up to rounding: products of other
    shapes round differently. With `release_language` the language expert leaves memory once it has read the prompts.

    Raises:
        RequestError: if a prompt and its image do not fit into the LLM's positions.
    """

    left = sum(request.sampling.candidates for request in requests)

    def draw_rows(rows: Sequence[DrawRequest], tell: Tell) -> tuple[Tensor, Tensor]:
        nonlocal left
        guidance = Guidance([request.sampling.guidance for request in rows])
        cache = read_prompts(transformer, rows, guidance=guidance, room=grid[0] * grid[1])
        left -= len(rows)
        if release_language and not left:
            transformer.release_language()
        return draw_codes(transformer, cache, rows, guidance=guidance, grid=grid, tell=tell)

    return draw_likeliest(requests, draw_rows, places=grid[0] * grid[1], progress=progress).view(-1, *grid)


def draw_likeliest(
    requests: Sequence[Request],
    draw_rows: Callable[[Sequence[Request], Tell], tuple[Tensor, Tensor]],
    *,
    places: int,
    progress: Progress | None,
) -> Tensor:
    """Draws every candidate of every request, some in a batch, and keeps the likeliest of each request: (B, N).

    Args:
        draw_rows: codes (rows, N) in the order of drawing, and their log-likelihoods (rows,), of a batch.
        places: N.
    """
    batches = _batches(requests)
    kept: list[Tensor] = []
    for number, batch in enumerate(batches):

        def tell(done: int, before: int = number * places) -> None:
            if progress is not None:
                progress(before + done, len(batches) * places)

        rows = [candidate for request in batch for candidate in _candidates(request)]
        codes_BN, likelihoods_B = draw_rows(rows, tell)
        start = 0
        for request in batch:
            end = start + request.sampling.candidates
            kept.append(codes_BN[start + int(likelihoods_B[start:end].argmax())])
            start = end
    return torch.stack(kept)


def _batches(requests: Sequence[Request]) -> list[list[Request]]:
    """Requests in order, as many at a time as their candidates allow."""
    batches: list[list[Request]] = [[]]
    room = MAX_ROWS
    for request in requests:
        if batches[-1] and request.sampling.candidates > room:
            batches.append([])
            room = MAX_ROWS
        batches[-1].append(request)
        room -= request.sampling.candidates
    return batches


def _candidates(request: Request) -> list[Request]:
    """The request with a seed per candidate; the first keeps its own."""
    return [
        replace(request, seed=(request.seed + number * SEED_STRIDE) % 2**63)
        for number in range(request.sampling.candidates)
    ]


def draw_codes(
    transformer: MarsTransformer,
    cache: StaticCache,
    requests: Sequence[DrawRequest],
    *,
    guidance: Guidance,
    grid: tuple[int, int],
    side: int = 1,
    low_BN: Tensor | None = None,
    tell: Tell,
) -> tuple[Tensor, Tensor]:
    """Draws codes after what the cache holds, a block of K = side * side at a time (`sequence/layout.py`).

    Args:
        low_BN: ids of the low-resolution codes that are refined, one row per row of the cache, in the order of drawing.
        tell: called after each block with how many codes are done.

    Returns:
        codes (B, N) in the order of drawing, and their log-likelihood (B,) after the prompt in nats.
    """
    vocabulary, places, block = transformer.vocabulary, grid[0] * grid[1], side * side
    device = transformer.visual_embedding.weight.device
    samplings = [request.sampling for request in requests for _ in range(block)]
    sources = [torch.Generator(device).manual_seed(request.seed) for request in requests]
    generators = [source for source in sources for _ in range(block)]
    ids_BK = torch.full((guidance.rows, block), vocabulary.image_start, device=device)
    codes_BN = torch.empty(len(requests), places, dtype=torch.long, device=device)
    likelihoods_B = torch.zeros(len(requests), device=device)
    for start in range(0, places, block):
        low_BK = None if low_BN is None else low_BN[:, start : start + block]
        segment = Segment(modality=Modality.IMAGE, ids=ids_BK, columns=grid[1], start=start, side=side, low=low_BK)
        logits = transformer.visual_logits(transformer(segment, cache))[..., : vocabulary.num_codes]
        guided = guidance.combine(logits.flatten(1)).view(len(samplings), -1)
        chosen_BK = sample(guided, samplings, generators).view(len(requests), block)
        prompted = logits[: len(requests)].float()
        surprises = prompted.logsumexp(dim=2) - prompted.gather(2, chosen_BK[..., None])[..., 0]
        likelihoods_B -= surprises.sum(dim=1)
        codes_BN[:, start : start + block] = chosen_BK
        ids_BK = guidance.spread(chosen_BK) + vocabulary.first_code
        tell(start + block)
    return codes_BN, likelihoods_B


def read_prompts(
    transformer: MarsTransformer, requests: Sequence[DrawRequest], *, guidance: Guidance, room: int
) -> StaticCache:
    """A cache that has read the text of each row of the batch (each distinct one once); `room` positions may follow.

    Raises:
        RequestError: if that does not fit into the LLM's positions.
    """
    texts = [request.prompt for request in requests] + [requests[index].free for index in guidance.guided]
    size = max(map(len, texts)) + room
    limit = transformer.config.language.max_positions
    if size > limit:
        raise RequestError(f"prompt and image must fit into {limit} positions, got {size}; shorten the prompt")
    distinct = sorted(set(texts), key=len)
    prefixes = dict(zip(distinct, read_prefixes(transformer, distinct), strict=True))
    cache = transformer.new_static_cache(batch=len(texts), size=size, images_only=True)
    cache.load([prefixes[text] for text in texts])
    return cache


@torch.inference_mode()
def continue_text(
    transformer: MarsTransformer,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    end: Sequence[int],
    image: Tensor | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    emit: Callable[[int], None] | None = None,
) -> list[int]:
    """Continues text ids until one of `end` or `max_tokens`; the end is not returned.

    Args:
        image: codes (R, C) that come before the text; `prompt` then begins with `</img>`. Without one this is the base
            LLM alone.
        sampling: default takes the likeliest id.
        emit: called with each id as it is chosen.

    Raises:
        RequestError: if the prompt leaves no room in the LLM's positions.
    """
    sampling = sampling or Sampling(temperature=0)
    before = 0 if image is None else image.numel() + 1
    limit = transformer.config.language.max_positions - before
    if len(prompt) >= limit:
        raise RequestError(f"the text must be shorter than {limit} tokens, got {len(prompt)}")
    max_tokens = min(max_tokens, limit - len(prompt))
    cache = transformer.new_static_cache(batch=1, size=before + len(prompt) + max_tokens)
    if image is not None:
        transformer(read_image(image[None], transformer.vocabulary), cache)
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = []
    segment = text_segment([list(prompt)])
    while len(found) < max_tokens:
        hidden = transformer(segment, cache)
        chosen = int(sample(transformer.text_logits(hidden[:, -1]), [sampling], [generator])[0])
        if chosen in end:
            break
        found.append(chosen)
        if emit is not None:
            emit(chosen)
        segment = text_segment([[chosen]])
    return found
