"""Ids in, ids out: draws code grids for prompts, and continues text. Knows neither pixels nor strings.

Letters: B requests, T positions, R rows, C columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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


MAX_ROWS = 128
"""Candidates that are drawn at once; more would only wait for each other."""
SEED_STRIDE = 0x1E3779B97F4A7C15
"""Between the seeds of the candidates of one request."""

Progress = Callable[[int, int], None]
"""Called after each code with how many are done and how many there are."""


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
    places = grid[0] * grid[1]
    batches = _batches(requests)
    kept: list[Tensor] = []
    for number, batch in enumerate(batches):

        def tell(done: int, before: int = number * places) -> None:
            if progress is not None:
                progress(before + done, len(batches) * places)

        last = number == len(batches) - 1
        rows = [candidate for request in batch for candidate in _candidates(request)]
        codes_BN, likelihoods_B = _draw_rows(
            transformer, rows, grid=grid, release_language=release_language and last, tell=tell
        )
        start = 0
        for request in batch:
            end = start + request.sampling.candidates
            kept.append(codes_BN[start + int(likelihoods_B[start:end].argmax())])
            start = end
    return torch.stack(kept).view(-1, *grid)


def _batches(requests: Sequence[DrawRequest]) -> list[list[DrawRequest]]:
    """Requests in order, as many at a time as their candidates allow."""
    batches: list[list[DrawRequest]] = [[]]
    room = MAX_ROWS
    for request in requests:
        if batches[-1] and request.sampling.candidates > room:
            batches.append([])
            room = MAX_ROWS
        batches[-1].append(request)
        room -= request.sampling.candidates
    return batches


def _candidates(request: DrawRequest) -> list[DrawRequest]:
    """The request with a seed per candidate; the first keeps its own."""
    return [
        replace(request, seed=(request.seed + number * SEED_STRIDE) % 2**63)
        for number in range(request.sampling.candidates)
    ]


def _draw_rows(
    transformer: MarsTransformer,
    requests: Sequence[DrawRequest],
    *,
    grid: tuple[int, int],
    release_language: bool,
    tell: Callable[[int], None],
) -> tuple[Tensor, Tensor]:
    """Codes (B, N) of each request, and their log-likelihood (B,) after the prompt in nats."""
    vocabulary, places = transformer.vocabulary, grid[0] * grid[1]
    guidance = Guidance([request.sampling.guidance for request in requests])
    texts = [request.prompt for request in requests] + [requests[index].free for index in guidance.guided]
    cache = _read_texts(transformer, texts, room=places)
    if release_language:
        transformer.release_language()
    samplings = [request.sampling for request in requests]
    device = transformer.visual_embedding.weight.device
    generators = [torch.Generator(device).manual_seed(request.seed) for request in requests]
    ids = torch.full((guidance.rows,), vocabulary.image_start, device=device)
    codes_BN = torch.empty(len(requests), places, dtype=torch.long, device=device)
    likelihoods_B = torch.zeros(len(requests), device=device)
    for place in range(places):
        segment = Segment(modality=Modality.IMAGE, ids=ids[:, None], columns=grid[1], start=place)
        hidden = transformer(segment, cache)
        logits = transformer.visual_logits(hidden[:, 0])[:, : vocabulary.num_codes]
        chosen_B = sample(guidance.combine(logits), samplings, generators)
        prompted = logits[: len(requests)].float()
        likelihoods_B += prompted.gather(1, chosen_B[:, None])[:, 0] - prompted.logsumexp(dim=1)
        codes_BN[:, place] = chosen_B
        ids = guidance.spread(chosen_B) + vocabulary.first_code
        tell(place + 1)
    return codes_BN, likelihoods_B


def _read_texts(transformer: MarsTransformer, texts: Sequence[tuple[int, ...]], *, room: int) -> StaticCache:
    """A cache that has read one text per row (each distinct one once) and has `room` for what follows."""
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
