"""Ids in, ids out: draws code grids for prompts, and continues text. Knows neither pixels nor strings.

Letters: B requests, T positions, R rows, C columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
    """Draws one code grid per request, all in one batch; (B, R, C) int64.

    Prompts may differ in length. A row's codes depend on its own request alone, up to rounding: products of other
    shapes round differently. With `release_language` the language expert leaves memory once it has read the prompts.

    Raises:
        RequestError: if a prompt and its image do not fit into the LLM's positions.
    """
    vocabulary, (rows, columns) = transformer.vocabulary, grid
    guidance = Guidance([request.sampling.guidance for request in requests])
    texts = [request.prompt for request in requests] + [requests[index].free for index in guidance.guided]
    cache = _read_texts(transformer, texts, room=rows * columns)
    if release_language:
        transformer.release_language()
    samplings = [request.sampling for request in requests]
    device = transformer.visual_embedding.weight.device
    generators = [torch.Generator(device).manual_seed(request.seed) for request in requests]
    ids = torch.full((guidance.rows,), vocabulary.image_start, device=device)
    codes_BN = torch.empty(len(requests), rows * columns, dtype=torch.long, device=device)
    for place in range(rows * columns):
        segment = Segment(modality=Modality.IMAGE, ids=ids[:, None], columns=columns, start=place)
        hidden = transformer(segment, cache)
        logits = transformer.visual_logits(hidden[:, 0])[:, : vocabulary.num_codes]
        codes_BN[:, place] = sample(guidance.combine(logits), samplings, generators)
        ids = guidance.spread(codes_BN[:, place]) + vocabulary.first_code
        if progress is not None:
            progress(place + 1, rows * columns)
    return codes_BN.view(-1, rows, columns)


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
