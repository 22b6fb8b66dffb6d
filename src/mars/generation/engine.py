"""Ids in, ids out: draws code grids for prompts, and continues text. Knows neither pixels nor strings.

Letters: R rows, C columns.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mars.errors import RequestError
from mars.generation.request import DrawRequest
from mars.generation.sampling import Sampling, sample
from mars.generation.scheduler import MAX_TOKENS, Failed, Finished, Scheduler
from mars.model.transformer import MarsTransformer
from mars.sequence.layout import read_image, text_segment

Progress = Callable[[int, int], None]
"""Called after each step with how many codes are done and how many there are, all candidates counted."""


def draw(
    transformer: MarsTransformer,
    requests: Sequence[DrawRequest],
    *,
    release_language: bool = False,
    progress: Progress | None = None,
) -> list[Tensor]:
    """Draws one code grid (R, C) int64 per request, together; `scheduler.py` is for those that come later.

    Prompts, grids and settings may differ. A picture's codes depend on its own request alone (`batch.py`). With
    `release_language` the language expert leaves memory once it has read the prompts.

    Raises:
        RequestError: if a prompt and its image do not fit into the LLM's positions, or the model cannot draw it.
    """
    longest = max(len(request.texts) * request.length for request in requests)
    scheduler = Scheduler(transformer, tokens=max(MAX_TOKENS, longest))
    tickets = [scheduler.submit(request) for request in requests]
    if release_language:
        scheduler.read_prompts()
        transformer.release_language()
    total = sum(request.sampling.candidates * request.places for request in requests)
    found: dict[int, Tensor] = {}
    while scheduler.busy:
        for event in scheduler.step():
            match event:
                case Finished():
                    found[event.ticket] = event.codes
                case Failed():
                    raise event.error
        if progress is not None:
            progress(scheduler.drawn, total)
    return [found[ticket] for ticket in tickets]


@torch.inference_mode()
def text_ids(
    transformer: MarsTransformer,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    end: Sequence[int],
    image: Tensor | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Continues text ids until one of `end` or `max_tokens`, id by id; the end is not yielded.

    Args:
        image: codes (R, C) that come before the text; `prompt` then begins with `</img>`. Without one this is the base
            LLM alone.
        sampling: default takes the likeliest id.

    Raises:
        RequestError: if the prompt leaves no room in the LLM's positions.
    """
    sampling = sampling or Sampling(temperature=0)
    before = 0 if image is None else image.numel() // transformer.vocabulary.slots + 1
    limit = transformer.config.language.max_positions - before
    if len(prompt) >= limit:
        raise RequestError(f"the text must be shorter than {limit} tokens, got {len(prompt)}")
    max_tokens = min(max_tokens, limit - len(prompt))
    cache = transformer.new_static_cache(batch=1, size=before + len(prompt) + max_tokens)
    if image is not None:
        transformer(read_image(image[None].to(transformer.device), transformer.vocabulary), cache)
    generator = torch.Generator(transformer.device).manual_seed(seed)
    segment = text_segment([list(prompt)])
    for _ in range(max_tokens):
        hidden = transformer(segment.to(transformer.device), cache)
        chosen = int(sample(transformer.text_logits(hidden[:, -1]), [sampling], [generator])[0])
        if chosen in end:
            return
        yield chosen
        segment = text_segment([[chosen]])
