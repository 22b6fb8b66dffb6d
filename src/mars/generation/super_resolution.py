"""Codes to more codes: a code grid is drawn again at a higher resolution, K codes a step (our own design, not the
paper's; `sequence/layout.py` says which codes a step draws). Knows neither pixels nor strings.

Letters: B requests, R rows, C columns, N codes of the high grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mars.errors import RequestError
from mars.generation.engine import DrawRequest, Progress, Tell, draw_codes, draw_likeliest, read_prompts
from mars.generation.guidance import Guidance
from mars.model.transformer import MarsTransformer
from mars.sequence.layout import drawing_order, low_image, refined_codes


@dataclass(frozen=True, kw_only=True)
class UpscaleRequest(DrawRequest):
    """One image to draw again, with the prompt that it was drawn for."""

    low: Tensor
    """(R, C) codes; all requests of a call share one grid."""


@torch.inference_mode()
def upscale(
    transformer: MarsTransformer,
    requests: Sequence[UpscaleRequest],
    *,
    scale: int,
    side: int,
    progress: Progress | None = None,
) -> Tensor:
    """Draws each request's codes again on a grid of `scale` times as many rows and columns; (B, R, C) int64.

    That takes N / K steps of K = side * side codes.

    As for `engine.draw`, a row's codes depend on its own request alone, up to rounding.

    Raises:
        ConfigError: if blocks do not fill the grid.
        RequestError: if the model cannot read low-resolution codes, or prompt and images do not fit into the LLM's
            positions.
    """
    if not transformer.config.semvie.low_input:
        raise RequestError("the model must have been trained to upscale (semvie.low_input), and was not; open another")
    rows, columns = requests[0].low.shape
    grid = rows * scale, columns * scale
    order = drawing_order(*grid, side=side)
    places = grid[0] * grid[1]

    def draw_rows(rows: Sequence[UpscaleRequest], tell: Tell) -> tuple[Tensor, Tensor]:
        device = transformer.visual_embedding.weight.device
        guidance = Guidance([request.sampling.guidance for request in rows])
        low_BRC = guidance.spread(torch.stack([request.low for request in rows]).to(device))
        low_BN = refined_codes(low_BRC, grid=grid).flatten(1)[:, order.to(device)] + transformer.vocabulary.first_code
        seen = low_image(low_BRC, transformer.vocabulary)
        cache = read_prompts(transformer, rows, guidance=guidance, room=seen.ids.shape[1] + places)
        transformer(seen, cache)
        return draw_codes(
            transformer, cache, rows, guidance=guidance, grid=grid, side=side, low_BN=low_BN, tell=tell
        )  # fmt: skip

    drawn_BN = draw_likeliest(requests, draw_rows, places=places, progress=progress)
    raster_BN = torch.empty_like(drawn_BN)
    raster_BN[:, order.to(drawn_BN.device)] = drawn_BN
    return raster_BN.view(-1, *grid)
